import pytest
from hypothesis import given
from hypothesis import strategies as st

from maskcast.engines.errors import InputError
from maskcast.pipeline.configuration.config_file import make_config, make_source

DOOR = {"name": "door", "polygon": [[0, 0], [0.5, 0], [0.5, 1], [0, 1]]}
GATE = {"name": "gate", "points": [[0.5, 0], [0.5, 1]]}


def source(**keys):
    return make_config({"sources": [{"url": "clip.mp4", **keys}]}).sources[0]


def test_zones_and_lines_are_read():
    found = source(
        zones=[
            {**DOOR, "labels": ["person"], "min_overlap": 0.3},
            {**DOOR, "name": "feet", "anchor": "feet"},
        ],
        lines=[GATE],
    )
    assert found.zones[0].polygon == ((0, 0), (0.5, 0), (0.5, 1), (0, 1))
    assert (found.zones[0].labels, found.zones[0].min_overlap) == (("person",), 0.3)
    assert found.zones[1].anchor == "feet"
    assert found.lines[0].points == ((0.5, 0), (0.5, 1))


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        (
            {"zones": [{**DOOR, "polygon": [[0, 0], [1, 1], [1, 0], [0, 1]]}]},
            r"zones\[0\].*'door'.*corner 1 and from corner 3 meet",
        ),
        ({"zones": [{**DOOR, "polygon": [[0, 0], [1.5, 0], [1, 1]]}]}, r"\[1.5, 0\] is outside"),
        ({"zones": [{**DOOR, "polygon": [[0, 0], [1, 1]]}]}, r"polygon: .*length >= 3"),
        ({"zones": [{**DOOR, "polygon": [[0, 0], [1, 0], [0.5, 0]]}]}, "meet"),
        ({"zones": [{**DOOR, "polygon": [[0, 0], [0, 0], [0.5, 1]]}]}, "meet"),
        ({"zones": [DOOR, DOOR]}, "two zones are named 'door'"),
        ({"lines": [GATE, GATE]}, "two lines are named 'gate'"),
        ({"zones": [{**DOOR, "name": f"z{n}"} for n in range(33)]}, "33 zones: .* at most 32"),
        ({"zones": [{**DOOR, "min_overlap": 0}]}, "min_overlap"),
        ({"zones": [{**DOOR, "min_overlp": 1}]}, "did you mean 'min_overlap'"),
        ({"zones": [{**DOOR, "anchor": "head"}]}, "use feet"),
        ({"lines": [{**GATE, "points": [[0, 0], [0, 0]]}]}, "both points are the same"),
        ({"lines": [{**GATE, "points": [[0, 0], [0, -0.1]]}]}, "outside the frame"),
        ({"lines": [{**GATE, "direction": "up"}]}, "use both, forward, backward"),
        ({"zones": [DOOR], "track": False}, "zones and lines need tracks"),
    ],
)
def test_what_is_wrong_is_named(keys, problem):
    with pytest.raises(InputError, match=problem) as error:
        source(**keys)
    assert "sources[0]" in str(error.value)


def test_a_source_that_is_added_is_checked_too():
    with pytest.raises(InputError, match="did you mean 'min_overlap'"):
        make_source({"url": "clip.mp4", "zones": [{**DOOR, "min_overlp": 1}]})


def cross(a, b, c, d):
    """Return whether two segments cross, by solving for the point on both."""
    (ax, ay), (bx, by), (cx, cy), (dx, dy) = a, b, c, d
    across = (bx - ax) * (dy - cy) - (by - ay) * (dx - cx)
    if across == 0:
        return False
    t = ((cx - ax) * (dy - cy) - (cy - ay) * (dx - cx)) / across
    u = ((cx - ax) * (by - ay) - (cy - ay) * (bx - ax)) / across
    return 0 < t < 1 and 0 < u < 1


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=4, max_size=7))
def test_no_polygon_with_crossing_edges_is_accepted(corners):
    edges = [(corners[i], corners[(i + 1) % len(corners)]) for i in range(len(corners))]
    crosses = any(
        cross(*edges[i], *edges[j]) for i in range(len(edges)) for j in range(i + 2, len(edges))
    )
    if crosses:
        with pytest.raises(InputError, match="meet"):
            source(zones=[{**DOOR, "polygon": corners}])
