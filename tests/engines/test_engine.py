import numpy as np
import pytest

from maskcast.engines.engine import Detections, Engine, to_instances
from maskcast.engines.image import NetworkImage


def blank(height, width, content, source):
    return NetworkImage(np.zeros((height, width, 3), np.uint8), content, source)


@pytest.fixture
def detections():
    """Return three boxes in two images: one of twice the network's size, one of half."""
    return Detections(
        images=[blank(64, 96, (60, 90), (120, 180)), blank(64, 96, (64, 96), (32, 48))],
        boxes=np.array([[0, 0, 90, 60], [10, 10, 20, 20], [40, 20, 60, 30]], np.float32),
        scores=np.array([0.9, 0.8, 0.7], np.float32),
        labels=np.array([1, 1, 1], np.int32),
        image_index=np.array([0, 0, 1], np.int32),
        features=None,
        release=lambda: None,
        keypoints=np.array(
            [[[5, 6, 0.5], [91, 61, 0.25]], [[15, 15, 1], [16, 17, 0]], [[50, 25, 0.75]] * 2],
            np.float32,
        ),
    )


def test_keypoints_come_out_in_source_pixels_inside_the_image_and_their_scores_stay(detections):
    first, second = to_instances(detections, None)
    assert first.keypoints.dtype == np.float32
    assert first.keypoints.tolist() == [
        [[10, 12, 0.5], [180, 120, 0.25]],
        [[30, 30, 1], [32, 34, 0]],
    ]
    assert second.keypoints.tolist() == [[[25, 12.5, 0.75]] * 2]


def test_keypoints_lie_in_their_boxes_as_the_network_gave_them(detections):
    detections.keypoints[1, 1] = [20, 10, 1]  # a corner of its box
    (first, _) = to_instances(detections, None)
    assert first.keypoints[1, 1, :2].tolist() == [first.boxes[1, 2], first.boxes[1, 1]]


def test_the_detections_keep_their_keypoints_in_pixels_of_the_network(detections):
    before = detections.keypoints.copy()
    to_instances(detections, None)
    assert (detections.keypoints == before).all()


def test_without_a_pose_there_are_no_keypoints(detections):
    detections.keypoints = None
    assert [found.keypoints for found in to_instances(detections, None)] == [None, None]


def test_an_engine_without_a_poser_says_how_to_load_one(timed_engine, detections):
    assert not Engine.has_pose
    with pytest.raises(RuntimeError, match="pose=True"):
        Engine.estimate_pose(timed_engine(), detections)
