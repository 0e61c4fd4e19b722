from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from maskcast.engines.errors import InputError
from maskcast.engines.instances.instances import Instances
from maskcast.pipeline.configuration.zones import LineConfig, ZoneConfig
from maskcast.pipeline.tracking.lines import Crossed
from maskcast.pipeline.tracking.regions import Regions, check_labels
from maskcast.pipeline.tracking.zones import Entered, Left

NAMES = ("background", "person", "dog")
LEFT_HALF = ((0, 0), (0.5, 0), (0.5, 1), (0, 1))
MIDDLE = ((0.5, 0), (0.5, 1))
FPS = 25
STEP = 4


def seen(*tracks, labels=None, wide=40, high=80):
    """Return instances with full masks, one around the centre of each track ``(id, x, y)``."""
    boxes = [[x - wide / 2, y - high / 2, x + wide / 2, y + high / 2] for _, x, y in tracks]
    return Instances(
        640,
        480,
        np.array(boxes, np.float32).reshape(-1, 4),
        np.full(len(tracks), 0.9, np.float32),
        np.array(labels or [1] * len(tracks), np.int32),
        np.full((len(tracks), 28, 28), 255, np.uint8),
        np.array([number for number, _, _ in tracks], np.int32),
    )


def follow(regions, frames, fps=FPS):
    """Update with the instances of frames in turn; return each event with the frame's index."""
    met = []
    for index, instances in enumerate(frames):
        happened = regions.update(instances, index / fps, index, 10**9 + index)
        met += [(index, one) for one in happened]
    return met


def zone(**keys):
    return ZoneConfig(**({"name": "door", "polygon": LEFT_HALF, "min_overlap": 0.3} | keys))


def line(**keys):
    return LineConfig(**({"name": "gate", "points": MIDDLE} | keys))


def move(begin, end, y=240, number=1, steps=None):
    """Return the instances of frames in which a track moves from one x to another."""
    steps = steps or abs(end - begin) // STEP
    return [seen((number, begin + (end - begin) * k / steps, y)) for k in range(steps + 1)]


def test_an_object_that_moves_through_a_zone_enters_and_leaves_it_once():
    regions = Regions([zone()], [], NAMES)
    met = follow(regions, move(600, 20) + move(20, 600))
    kinds = [type(one.change) for _, one in met]
    assert kinds == [Entered, Left]
    (_, entered), (_, left) = met
    # It enters where 30 % of the mask is inside: its centre is 8 pixels beyond the edge.
    assert 600 - STEP * entered.change.sighting.index == pytest.approx(328, abs=STEP)
    inside = left.change.sighting.index - entered.change.sighting.index
    assert left.change.dwell_s == pytest.approx(inside / FPS)
    assert regions.zones() == {"door": 0}


def test_the_count_is_of_the_objects_inside_now():
    regions = Regions([zone()], [], NAMES)
    frames = [seen((1, 100, 200), (2, 200, 200), (3, 500, 200))] * 10
    follow(regions, frames)
    assert regions.zones() == {"door": 2}
    assert [one.change.dwell_s for one in regions.end(1)] == [pytest.approx(9 / FPS)]
    assert regions.zones() == {"door": 1}
    assert regions.end(3) == []


def test_a_mask_that_flickers_at_the_edge_causes_one_event_at_most():
    rng = np.random.default_rng(0)
    regions = Regions([zone(min_overlap=0.5)], [line()], NAMES)
    frames = [seen((1, 320 + rng.normal(0, 1.2), 240)) for _ in range(2000)]
    assert len(follow(regions, frames)) <= 1


def test_one_frame_inside_or_outside_changes_nothing():
    regions = Regions([zone()], [], NAMES)
    outside, inside = seen((1, 500, 240)), seen((1, 100, 240))
    assert follow(regions, [outside] * 9 + [inside] + [outside] * 9) == []
    met = follow(regions, [inside] * 9 + [outside] + [inside] * 9)
    assert [type(one.change) for _, one in met] == [Entered]


def test_at_one_frame_per_second_two_frames_decide():
    regions = Regions([zone()], [line()], NAMES)
    frames = [seen((1, x, 240)) for x in (600, 500, 100, 90, 80)]
    met = follow(regions, frames, fps=1)
    assert [(index, one.region) for index, one in met] == [(3, "door"), (3, "gate")]
    assert all(one.change.sighting.index == 2 for _, one in met)


def test_instances_without_a_track_do_not_count():
    regions = Regions([zone()], [line()], NAMES)
    assert follow(regions, [seen((0, 100, 240), (0, 200, 240))] * 20) == []
    assert regions.zones() == {"door": 0}


def test_only_the_wanted_labels_count():
    regions = Regions([zone(labels=("dog",))], [line(labels=("dog",))], NAMES)
    frames = [seen((1, 100 + 8 * k, 240), (2, 100 + 8 * k, 340), labels=[1, 2]) for k in range(60)]
    assert {one.track_id for _, one in follow(regions, frames)} == {2}


def test_the_feet_decide_if_they_are_the_anchor():
    below = ((0, 0.6), (1, 0.6), (1, 1), (0, 1))  # from y = 288
    regions = Regions(
        [zone(polygon=below, anchor="feet"), zone(name="mask", polygon=below, min_overlap=0.9)],
        [],
        NAMES,
    )
    stands = [seen((1, 300, 260))] * 20  # its feet are at 300
    met = follow(regions, stands)
    assert [one.region for _, one in met] == ["door"]


@pytest.mark.parametrize(
    ("begin", "end", "direction"), [(100, 540, "forward"), (540, 100, "backward")]
)
def test_a_line_is_crossed_in_a_direction(begin, end, direction):
    regions = Regions([], [line()], NAMES)
    ((_, met),) = follow(regions, move(begin, end))
    assert (met.region, met.change.direction) == ("gate", direction)
    assert regions.lines()["gate"][direction] == 1
    assert sum(regions.lines()["gate"].values()) == 1


def test_forward_is_to_the_left_of_the_direction_from_the_first_point_to_the_second():
    """An object that moves up crosses a line from left to right forward."""
    regions = Regions([], [line(points=((0, 0.5), (1, 0.5)))], NAMES)
    up = [seen((1, 300, 400 - 4 * k)) for k in range(80)]
    ((_, met),) = follow(regions, up)
    assert met.change.direction == "forward"


def test_only_crossings_in_the_wanted_direction_count():
    regions = Regions([], [line(direction="backward")], NAMES)
    met = follow(regions, move(100, 540) + move(540, 100))
    assert [one.change.direction for _, one in met] == ["backward"]
    assert regions.lines() == {"gate": {"forward": 0, "backward": 1}}


def test_an_object_that_passes_the_end_of_a_line_has_not_crossed_it():
    regions = Regions([], [line(points=((0.5, 0), (0.5, 0.5)))], NAMES)
    assert follow(regions, move(100, 540, y=400)) == []
    assert len(follow(regions, move(540, 100, y=100))) == 1


def test_counting_is_exact_for_many_objects():
    rng = np.random.default_rng(7)
    regions = Regions([zone()], [line()], NAMES)
    forward = backward = entries = 0
    met, index = [], 0
    for number in range(1, 41):
        ways = [float(rng.choice([100, 540]))]
        for _ in range(rng.integers(1, 5)):
            ways.append(640 - ways[-1])
        entries += sum(x == 100 for x in ways)
        forward += sum(b > a for a, b in pairwise(ways))
        backward += sum(b < a for a, b in pairwise(ways))
        for a, b in pairwise(ways):
            for k in range(56):
                x = a + (b - a) * min(k, 50) / 50 + rng.normal(0, 2)
                frame = seen((number, x, rng.uniform(200, 280)))
                met += regions.update(frame, index / FPS, index, index)
                index += 1
        met += regions.end(number)
    kinds = [type(one.change) for one in met]
    assert kinds.count(Entered) == kinds.count(Left) == entries
    assert regions.lines() == {"gate": {"forward": forward, "backward": backward}}
    assert kinds.count(Crossed) == forward + backward


def test_a_crossing_just_before_the_end_of_a_track_counts():
    regions = Regions([], [line()], NAMES)
    assert follow(regions, [seen((1, x, 240)) for x in (200, 240, 280, 360, 400)]) == []
    (met,) = regions.end(1)
    assert met.change.direction == "forward"
    assert regions.lines()["gate"]["forward"] == 1


def test_another_frame_size_moves_the_zones_and_keeps_the_totals():
    regions = Regions([zone()], [line()], NAMES)
    follow(regions, move(100, 540))
    regions.end(1)
    half = seen((2, 200, 100))
    small = replace(half, width=320, height=240)
    met = follow(regions, [small] * 10)
    assert met == []  # 200 of 320 is to the right of the middle
    assert regions.lines()["gate"]["forward"] == 1


def test_nothing_is_kept_of_tracks_that_have_ended():
    regions = Regions([zone()], [line()], NAMES)
    for number in range(1, 300):
        follow(regions, [seen((number, 100, 240))] * 3)
        regions.end(number)
    kept = [len(watch._visits) for watch in regions._zones]
    kept += [len(watch._sides) for watch in regions._lines]
    assert kept == [0, 0]
    assert not regions._labels


def test_a_class_that_the_model_lacks_is_named():
    with pytest.raises(InputError, match="no class 'persn'; did you mean 'person'"):
        check_labels([zone(labels=("persn",))], NAMES, "cam")
    check_labels([zone(labels=("person",)), line(labels=("dog",))], NAMES, "cam")
