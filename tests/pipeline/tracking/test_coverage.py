import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maskcast.engines.instances.instances import Instances
from maskcast.pipeline.tracking.coverage import Coverage, centres, feet

AXIS = np.linspace(-1, 1, 28)
DISC = (AXIS[:, None] ** 2 + AXIS[None] ** 2 <= 0.9).astype(np.uint8)
FULL = np.ones((28, 28), np.uint8)
SIZE = 160


def inside(polygon, x, y):
    """Return which points lie in a polygon, by the even-odd rule."""
    result = np.zeros(np.broadcast(x, y).shape, bool)
    for (x0, y0), (x1, y1) in zip(polygon, np.roll(polygon, -1, axis=0), strict=True):
        if y0 != y1:
            result ^= ((y0 <= y) != (y1 <= y)) & (x0 + (y - y0) * (x1 - x0) / (y1 - y0) <= x)
    return result


def pixels(step):
    """Return the centres of the cells of a full-size mask, each ``step`` pixels wide."""
    centre = (np.arange(int(SIZE / step)) + 0.5) * step
    return centre[None], centre[:, None]


@st.composite
def polygons(draw):
    """Polygons without crossing edges, of 3 to 9 corners, not all convex."""
    corners = draw(st.integers(3, 9))
    x, y = draw(st.tuples(st.floats(0, SIZE), st.floats(0, SIZE)))
    shares = draw(st.lists(st.floats(0.2, 1), min_size=corners, max_size=corners))
    far = draw(st.lists(st.floats(5, 150), min_size=corners, max_size=corners))
    angles = np.cumsum(shares) / np.sum(shares) * 2 * np.pi
    if np.diff([0, *angles]).max() >= np.pi:  # its centre would lie outside
        angles = np.arange(corners) / corners * 2 * np.pi
    around = np.stack([np.cos(angles), np.sin(angles)], axis=1) * np.array(far)[:, None]
    polygon = around + np.array([x, y])
    return polygon[::-1] if draw(st.booleans()) else polygon


@st.composite
def placed(draw):
    """A crop of 0 and 1, and its box."""
    kind = draw(st.integers(0, 2**32 - 1))
    noise = (np.random.default_rng(kind).random((28, 28)) < 0.5).astype(np.uint8)
    crop = draw(st.sampled_from([DISC, FULL, noise]))
    x, y = draw(st.tuples(st.floats(0, 100), st.floats(0, 100)))
    wide, high = draw(st.tuples(st.floats(8, 56), st.floats(8, 56)))
    return crop, np.array([x, y, x + wide, y + high])


@settings(max_examples=80)
@given(placed(), polygons())
def test_the_share_is_that_of_a_rasterised_mask_of_full_size(place, polygon):
    crop, box = place
    x, y = pixels(0.25)
    column = np.floor((x - box[0]) * 28 / (box[2] - box[0])).astype(int)
    row = np.floor((y - box[1]) * 28 / (box[3] - box[1])).astype(int)
    shown = (column >= 0) & (column < 28) & (row >= 0) & (row < 28)
    mask = shown & (crop[np.clip(row, 0, 27), np.clip(column, 0, 27)] > 0)
    expected = (mask & inside(polygon, x, y)).sum() / mask.sum()
    found = Coverage([polygon]).shares(crop[None], box[None])[0, 0]
    # Rasterising is wrong by at most about a pixel along the polygon's edges.
    along = 0.25 * np.hypot(*(box[2:] - box[:2])) * len(polygon) / (mask.sum() * 0.25**2)
    assert found == pytest.approx(expected, abs=min(0.25 * along + 1e-3, 0.05))


@settings(max_examples=30)
@given(polygons(), st.integers(10, 80), st.integers(10, 80))
def test_the_share_is_nearly_that_of_the_pixels_that_are_drawn(polygon, x, y):
    """Drawn masks have smooth edges: they differ by half a cell along the outline."""
    box = np.array([[x, y, x + 56, y + 70]], np.float32)
    seen = Instances(
        SIZE, SIZE, box, np.ones(1, np.float32), np.ones(1, np.int32), DISC[None] * np.uint8(255)
    )
    mask = seen.mask(0)
    expected = (mask & inside(polygon, *pixels(1.0))).sum() / mask.sum()
    found = Coverage([polygon]).shares(DISC[None], box.astype(float))[0, 0]
    assert found == pytest.approx(expected, abs=0.04)


@given(placed(), polygons())
def test_the_two_sides_of_a_line_make_up_the_whole(place, polygon):
    crop, box = place
    low, high = polygon.min(axis=0) - 1, polygon.max(axis=0) + 1
    x, y = (low[0] + high[0]) / 2, (low[1] + high[1]) / 2
    parts = [
        np.array([[-9e3, -9e3], [x, -9e3], [x, 9e3], [-9e3, 9e3]]),
        np.array([[x, -9e3], [9e3, -9e3], [9e3, 9e3], [x, 9e3]]),
        np.array([[-9e3, -9e3], [9e3, -9e3], [9e3, y], [-9e3, y]]),
        np.array([[-9e3, y], [9e3, y], [9e3, 9e3], [-9e3, 9e3]]),
    ]
    left, right, above, below = Coverage(parts).shares(crop[None], box[None])[0]
    assert left + right == pytest.approx(1, abs=1e-9)
    assert above + below == pytest.approx(1, abs=1e-9)


def test_shares_of_several_masks_and_polygons_keep_their_places():
    boxes = np.array([[0, 0, 20, 20], [100, 100, 120, 120], [50, 0, 70, 20]], float)
    squares = [
        np.array([[0, 0], [10, 0], [10, 20], [0, 20]], float),
        np.array([[90, 90], [130, 90], [130, 130], [90, 130]], float),
    ]
    found = Coverage(squares).shares(np.stack([FULL] * 3), boxes)
    assert found == pytest.approx(np.array([[0.5, 0], [0, 1], [0, 0]]))


def test_an_upright_edge_through_the_middle_of_a_cell_halves_it():
    half = np.array([[15, -5], [99, -5], [99, 99], [15, 99]], float)
    box = np.array([[1, 0, 29, 28.0]])
    assert Coverage([half]).shares(FULL[None], box)[0, 0] == pytest.approx(0.5)


def test_an_empty_mask_is_in_no_polygon():
    whole = np.array([[0, 0], [SIZE, 0], [SIZE, SIZE], [0, SIZE]], float)
    assert Coverage([whole]).shares(0 * FULL[None], np.array([[5, 5, 9, 9.0]])).tolist() == [[0]]


def test_without_masks_or_polygons_there_is_nothing():
    assert Coverage([]).shares(FULL[None], np.array([[0, 0, 9, 9.0]])).shape == (1, 0)
    square = np.array([[0, 0], [9, 0], [9, 9], [0, 9]], float)
    assert Coverage([square]).shares(FULL[:0].reshape(0, 28, 28), np.zeros((0, 4))).shape == (0, 1)
    assert Coverage([]).contains(np.zeros((2, 2))).shape == (2, 0)


def test_a_box_without_area_is_no_error():
    square = np.array([[0, 0], [9, 0], [9, 9], [0, 9]], float)
    boxes = np.array([[3, 3, 3, 8], [20, 3, 20, 3]], float)
    assert np.isfinite(Coverage([square]).shares(np.stack([FULL, FULL]), boxes)).all()


def test_feet_are_the_lowest_point_and_the_centre_is_that_of_the_mask():
    upper = FULL.copy()
    upper[14:] = 0
    upper[:, 14:] = 0
    box = np.array([[100, 200, 128, 256.0]])
    assert feet(upper[None], box)[0] == pytest.approx([107, 228])
    assert centres(upper[None], box)[0] == pytest.approx([107, 214])
    assert feet(0 * FULL[None], box)[0] == pytest.approx([114, 256])
