import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maskcast.engines.instances.instances import Instances
from maskcast.pipeline.tracking.overlap import binary_crops, mask_areas, mask_iou

AXIS = np.linspace(-1, 1, 28)
DISC = (AXIS[:, None] ** 2 + AXIS[None] ** 2 <= 1).astype(np.uint8)
LEFT = np.repeat((AXIS < 0)[None], 28, axis=0).astype(np.uint8)


def rasterised(crop, box, size=400):
    """Return the full-size mask of a crop, without interpolation."""
    x = np.floor((np.arange(size) + 0.5 - box[0]) * 28 / (box[2] - box[0])).astype(int)
    y = np.floor((np.arange(size) + 0.5 - box[1]) * 28 / (box[3] - box[1])).astype(int)
    inside = ((y >= 0) & (y < 28))[:, None] & ((x >= 0) & (x < 28))[None]
    return inside & (crop[np.clip(y, 0, 27)][:, np.clip(x, 0, 27)] > 0)


BOXES = st.tuples(
    st.integers(0, 200), st.integers(0, 200), st.integers(40, 200), st.integers(40, 200)
).map(lambda b: (b[0], b[1], b[0] + b[2], b[1] + b[3]))


@settings(max_examples=60)
@given(BOXES, BOXES, st.sampled_from([DISC, LEFT]), st.sampled_from([DISC, LEFT]))
def test_the_overlap_is_that_of_full_size_masks(box_a, box_b, crop_a, crop_b):
    a, b = rasterised(crop_a, box_a), rasterised(crop_b, box_b)
    expected = (a & b).sum() / (a | b).sum()
    boxes = np.array([box_a], np.float64), np.array([box_b], np.float64)
    found = mask_iou(crop_a[None], boxes[0], crop_b[None], boxes[1])
    assert found[0, 0] == pytest.approx(expected, abs=0.12)  # 12 samples per side


def test_every_pair_has_its_place():
    boxes = np.array([[0, 0, 10, 10], [100, 100, 110, 110]], np.float64)
    crops = np.stack([DISC, DISC])
    assert mask_iou(crops, boxes, crops, boxes) == pytest.approx(np.eye(2))
    assert mask_iou(crops, boxes, crops[:1], boxes[1:]).tolist() == [[0], [1]]


def test_two_halves_of_one_box_do_not_overlap_though_their_boxes_are_equal():
    box = np.array([[10, 10, 50, 90]], np.float64)
    assert mask_iou(LEFT[None], box, 1 - LEFT[None], box)[0, 0] == 0


def test_nothing_overlaps_nothing():
    none, some = np.zeros((0, 4)), np.array([[0, 0, 9, 9]], np.float64)
    empty = np.zeros((0, 28, 28), np.uint8)
    assert mask_iou(empty, none, DISC[None], some).shape == (0, 1)
    assert mask_iou(DISC[None], some, np.zeros_like(DISC)[None], some).tolist() == [[0]]


def test_areas_are_in_square_pixels():
    box = np.array([[0, 0, 56, 28]], np.float64)
    assert mask_areas(LEFT[None], box) == pytest.approx([56 * 28 / 2])


def test_boxes_stand_for_masks_where_a_model_has_none():
    seen = Instances(
        9, 9, np.zeros((1, 4), np.float32), np.ones(1, np.float32), np.ones(1, np.int32)
    )
    assert binary_crops(seen).all()
