import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maskcast.engines.instances.masks import MASK_SIZE, Patch, crop_crossings, fill_crossings
from maskcast.engines.instances.polygons import contours, ring_crossings, trace_mask, trace_patch


def blob(seed, softness):
    """An irregular star-shaped crop, sometimes with a hole."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:MASK_SIZE, 0:MASK_SIZE] - rng.uniform(9, 19, 2)[:, None, None]
    angle, radius = np.arctan2(y, x), np.hypot(x, y)
    edge = 9 + sum(
        rng.uniform(-1.5, 1.5) * np.cos(k * angle + rng.uniform(0, 6)) for k in (1, 2, 3)
    )
    inside = np.minimum(edge - radius, radius - rng.choice([-99, 3]))
    return np.rint(255 / (1 + np.exp(-inside * softness))).astype(np.uint8)


def area(ring):
    """Shoelace formula; positive for a ring that runs clockwise on screen."""
    x, y = ring.astype(np.float64).T
    return 0.5 * (x * np.roll(y, -1) - np.roll(x, -1) * y).sum()


def whole(patch, width, height):
    full = np.zeros((height, width), dtype=bool)
    rows, columns = patch.pixels.shape
    full[patch.y0 : patch.y0 + rows, patch.x0 : patch.x0 + columns] = patch.pixels
    return full


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    softness=st.floats(0.3, 5),
    corner=st.tuples(st.floats(0, 150), st.floats(0, 150)),
    size=st.tuples(st.floats(12, 250), st.floats(12, 250)),
)
def test_a_filled_outline_is_the_pasted_mask(seed, softness, corner, size):
    crop, (width, height) = blob(seed, softness), (300, 260)
    box = np.array([*corner, corner[0] + size[0], corner[1] + size[1]], dtype=np.float32)
    box = np.minimum(box, [width, height, width, height]).astype(np.float32)
    rings = trace_mask(crop, box, width, height)
    outline = whole(fill_crossings(ring_crossings(rings)), width, height)
    pasted = whole(fill_crossings(crop_crossings(crop, box, width, height)), width, height)
    assert (outline & pasted).sum() >= 0.95 * (outline | pasted).sum()


def test_a_hole_has_the_opposite_orientation():
    crop = np.zeros((MASK_SIZE, MASK_SIZE), dtype=np.uint8)
    crop[4:24, 4:24] = 255
    crop[10:18, 10:18] = 0
    rings = trace_mask(crop, np.array([0, 0, 280, 280], dtype=np.float32), 400, 400)
    outer, hole = sorted(map(area, rings), reverse=True)
    assert outer == pytest.approx(200**2, rel=0.05)
    assert hole == pytest.approx(-(80**2), rel=0.05)


def test_a_full_crop_has_the_outline_of_its_box():
    crop = np.full((MASK_SIZE, MASK_SIZE), 255, dtype=np.uint8)
    (ring,) = trace_mask(crop, np.array([28, 56, 84, 140], dtype=np.float32), 400, 400)
    assert ring.min(axis=0) == pytest.approx([28, 56], abs=1)
    assert ring.max(axis=0) == pytest.approx([84, 140], abs=1)
    assert ring.dtype == np.float32


def test_an_outline_stays_inside_the_image():
    crop = np.full((MASK_SIZE, MASK_SIZE), 255, dtype=np.uint8)
    for ring in trace_mask(crop, np.array([-30, -30, 90, 90], dtype=np.float32), 50, 40):
        assert ring.min() >= 0
        assert np.all(ring <= [50, 40])


def test_an_empty_crop_has_no_outline():
    crop = np.zeros((MASK_SIZE, MASK_SIZE), dtype=np.uint8)
    assert trace_mask(crop, np.array([0, 0, 9, 9], dtype=np.float32), 50, 50) == []
    assert fill_crossings(ring_crossings([])).pixels.size == 0


@pytest.mark.parametrize(("middle", "rings"), [(100, 2), (160, 1)])
def test_a_saddle_is_joined_where_the_bilinear_surface_is_inside(middle, rings):
    values = np.zeros((4, 4), dtype=np.float32)
    # Corners 200 and 200 across corners of such height that the saddle point is at `middle`.
    values[1, 1] = values[2, 2] = 200
    values[1, 2] = values[2, 1] = 2 * middle - 200
    assert len(contours(values, 127.5)) == rings


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), density=st.floats(0, 1))
def test_the_outline_of_pixels_fills_to_the_same_pixels(seed, density):
    pixels = np.random.default_rng(seed).random((11, 17)) < density
    rings = trace_patch(Patch(3, 5, pixels))
    assert np.array_equal(
        whole(fill_crossings(ring_crossings(rings)), 30, 30), whole(Patch(3, 5, pixels), 30, 30)
    )


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_contours_never_share_an_edge_and_all_close(seed):
    values = np.zeros((12, 12), dtype=np.float32)
    values[1:-1, 1:-1] = np.random.default_rng(seed).integers(0, 256, (10, 10))
    rings = contours(values, 127.5)
    inside = values > 127.5
    crossed = (inside[1:] != inside[:-1]).sum() + (inside[:, 1:] != inside[:, :-1]).sum()
    assert sum(map(len, rings)) == crossed
    for ring in rings:
        assert len(ring) >= 4
        steps = np.abs(np.roll(ring, -1, axis=0) - ring).max(axis=1)
        assert steps.max() <= 1
