import json
from dataclasses import replace

import numpy as np
import pytest
from faster_coco_eval import mask as coco

from maskcast.engines.instances.instances import (
    MASK_SIZE,
    VISIBLE,
    Instances,
    PolygonMasks,
    RleMasks,
)

# supervision warns about OpenCV when it is first imported.
pytestmark = pytest.mark.filterwarnings("ignore:OpenCV:UserWarning")

NAMES = ("background", "person", "cat")


@pytest.fixture
def three():
    y, x = np.mgrid[0:MASK_SIZE, 0:MASK_SIZE] - 13.5
    disc = np.rint(255 / (1 + np.exp(np.hypot(x, y) - 11))).astype(np.uint8)
    return Instances(
        width=160,
        height=120,
        boxes=np.array([[10, 20, 60, 90], [100, 0, 160, 60], [0, 0, 160, 120]], dtype=np.float32),
        scores=np.array([0.9, 0.8, 0.7], dtype=np.float32),
        labels=np.array([1, 2, 1], dtype=np.int32),
        masks=np.stack([disc] * 3),
    )


def in_form(instances, form):
    """Return the same instances with masks in one of the forms that a subscriber receives."""
    n = range(len(instances))
    masks = {
        "crops": lambda: instances.masks,
        "rle": lambda: RleMasks(instances.counts()),
        "polygons": lambda: PolygonMasks(tuple(tuple(instances.polygons(i)) for i in n)),
    }[form]()
    return Instances(160, 120, instances.boxes, instances.scores, instances.labels, masks)


FORMS = pytest.mark.parametrize("form", ["crops", "rle", "polygons"])


@FORMS
@pytest.mark.parametrize(
    ("index", "scores"),
    [
        (0, [0.9]),
        (-1, [0.7]),
        (slice(1, None), [0.8, 0.7]),
        (np.array([True, False, True]), [0.9, 0.7]),
        (np.array([2, 0]), [0.7, 0.9]),
        (np.array([], dtype=np.int64), []),
    ],
    ids=str,
)
def test_an_index_selects_from_all_arrays(three, form, index, scores):
    some = in_form(three, form)[index]
    assert some.scores.tolist() == pytest.approx(scores)
    assert len(some) == len(some.boxes) == len(some.labels) == len(some.masks) == len(scores)
    assert (some.width, some.height) == (160, 120)
    for i, score in enumerate(scores):
        original = int(np.flatnonzero(np.isclose(three.scores, score))[0])
        assert (some.mask(i) != three.mask(original)).mean() < 0.01


def test_a_number_beyond_the_end_is_an_index_error_so_that_iteration_ends(three):
    with pytest.raises(IndexError):
        three[3]
    assert [len(one) for one in three] == [1, 1, 1]


@FORMS
def test_every_form_gives_the_same_mask(three, form):
    other = in_form(three, form)
    for i in range(3):
        mask = other.mask(i)
        assert mask.shape == (120, 160)
        assert mask.dtype == np.bool_
        expected = three.mask(i)
        assert (mask & expected).sum() >= 0.97 * (mask | expected).sum()
        assert np.array_equal(coco.decode(other.rle(i)).astype(bool), mask)


@FORMS
def test_every_form_has_outlines(three, form):
    for i in range(3):
        (ring,) = in_form(three, form).polygons(i)
        assert ring.shape[1] == 2
        assert ring.shape[0] >= 3


def test_a_patch_is_the_mask_without_its_surroundings(three):
    x0, y0, pixels = three.patch(0)
    rows, columns = pixels.shape
    assert rows <= 70
    assert columns <= 50
    mask = three.mask(0)
    assert np.array_equal(mask[y0 : y0 + rows, x0 : x0 + columns], pixels)
    assert mask.sum() == pixels.sum() > 0


def test_coco_results_are_json_that_coco_tools_read(three):
    results = json.loads(json.dumps(three.to_coco(NAMES)))
    assert [r["category"] for r in results] == ["person", "cat", "person"]
    assert [r["category_id"] for r in results] == [1, 2, 1]
    assert results[0]["bbox"] == [10, 20, 50, 70]
    assert results[0]["score"] == pytest.approx(0.9)
    assert np.array_equal(coco.decode(results[1]["segmentation"]).astype(bool), three.mask(1))
    assert "category" not in three.to_coco()[0]


def test_supervision_receives_boxes_masks_and_names(three):
    detections = three.to_supervision(NAMES)
    assert type(detections).__module__.startswith("supervision")
    assert detections.mask.shape == (3, 120, 160)
    assert np.array_equal(detections.mask[1], three.mask(1))
    assert detections.class_id.tolist() == [1, 2, 1]
    assert detections["class_name"].tolist() == ["person", "cat", "person"]
    assert detections[detections.confidence > 0.75].xyxy.shape == (2, 4)


def test_instances_without_masks_raise_when_a_mask_is_requested(three):
    boxes = Instances(160, 120, three.boxes, three.scores, three.labels)
    assert boxes[1:].masks is None
    assert "segmentation" not in boxes.to_coco()[0]
    assert boxes.to_supervision().mask is None
    with pytest.raises(ValueError, match="no masks"):
        boxes.mask(0)
    with pytest.raises(ValueError, match="no masks"):
        boxes.polygons(0)


def test_an_image_without_objects_has_empty_instances():
    nothing = Instances.empty(640, 480)
    assert len(nothing) == 0
    assert nothing.to_coco() == []
    assert len(nothing.to_supervision(NAMES)) == 0
    assert len(nothing[:5]) == 0


def test_arrays_of_different_lengths_are_refused(three):
    with pytest.raises(ValueError, match="length"):
        Instances(160, 120, three.boxes, three.scores[:2], three.labels, three.masks)
    with pytest.raises(ValueError, match="length"):
        Instances(160, 120, three.boxes, three.scores, three.labels, three.masks[:1])


def test_track_ids_are_selected_with_the_rest_and_reach_other_libraries(three):
    tracked = replace(three, track_ids=np.array([5, 0, 9], np.int32))
    assert tracked[np.array([2, 0])].track_ids.tolist() == [9, 5]
    assert tracked.to_supervision().tracker_id.tolist() == [5, -1, 9]
    assert [found["track_id"] for found in tracked.to_coco()] == [5, 0, 9]
    assert three.to_supervision().tracker_id is None
    assert "track_id" not in three.to_coco()[0]


def test_track_ids_of_another_length_are_refused(three):
    with pytest.raises(ValueError, match="track_ids"):
        replace(three, track_ids=np.array([5], np.int32))


def test_instances_are_described_on_one_line() -> None:
    several = Instances(
        1920,
        1080,
        boxes=np.zeros((7, 4), np.float32),
        scores=np.linspace(0.9, 0.3, 7, dtype=np.float32),
        labels=np.arange(1, 8, dtype=np.int32),
    )
    assert repr(several) == (
        "<Instances: 7 in 1920x1080, labels 1, 2, 3, 4, 5, ..., "
        "scores 0.90, 0.80, 0.70, 0.60, 0.50, ..., no masks>"
    )
    assert repr(Instances.empty(8, 6)) == "<Instances: 0 in 8x6, masks as 28x28 crops>"


def posed(instances, seed=0):
    """Return the same instances with 17 keypoints each."""
    keypoints = np.random.default_rng(seed).random((len(instances), 17, 3), dtype=np.float32)
    return replace(instances, keypoints=keypoints)


def test_an_index_selects_keypoints_with_their_instances(three):
    whole = posed(three)
    assert (whole[1].keypoints == whole.keypoints[1:2]).all()
    assert (whole[np.array([2, 0])].keypoints == whole.keypoints[[2, 0]]).all()
    assert whole[three.scores > 1].keypoints.shape == (0, 17, 3)
    assert "17 keypoints" in repr(whole)


def test_keypoints_of_another_number_of_instances_are_refused(three):
    with pytest.raises(ValueError, match="differ in length"):
        replace(three, keypoints=np.zeros((2, 17, 3), np.float32))


def test_coco_results_hold_each_keypoint_as_three_numbers_and_count_the_visible_ones(three):
    whole = posed(three)
    whole.keypoints[..., 2] = 0.2
    whole.keypoints[1, :5, 2] = VISIBLE
    found = json.loads(json.dumps(whole.to_coco()))
    assert [len(one["keypoints"]) for one in found] == [51, 51, 51]
    assert [one["num_keypoints"] for one in found] == [0, 5, 0]
    assert np.float32(found[1]["keypoints"][3:6]).tolist() == whole.keypoints[1, 1].tolist()
    assert not {"keypoints", "num_keypoints"} & set(three.to_coco()[0])


def test_supervision_gets_the_keypoints_in_the_order_of_its_detections(three):
    whole = posed(three)
    found, boxes = whole.to_supervision_keypoints(NAMES), whole.to_supervision(NAMES)
    assert (found.xy == whole.keypoints[..., :2]).all()
    assert (found.keypoint_confidence == whole.keypoints[..., 2]).all()
    assert (found.visible == (whole.keypoints[..., 2] >= VISIBLE)).all()
    assert (found.detection_confidence == boxes.confidence).all()
    assert found.class_id.tolist() == boxes.class_id.tolist()
    assert found.data["class_name"].tolist() == boxes.data["class_name"].tolist()


def test_supervision_gets_no_keypoints_where_no_pose_was_estimated(three):
    with pytest.raises(ValueError, match="no keypoints"):
        three.to_supervision_keypoints()
