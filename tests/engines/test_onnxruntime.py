from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace as replace_fields
from parity import assert_refuses_calls_when_closed

from maskcast.engines.bundle import Bundle
from maskcast.engines.instances.keypoints import decode_heatmaps
from maskcast.engines.onnxruntime import OnnxRuntimeEngine


@pytest.fixture(scope="module")
def engine(calibrated_bundle: Bundle) -> OnnxRuntimeEngine:
    return OnnxRuntimeEngine(calibrated_bundle)


def test_results_match_torchvision(engine: OnnxRuntimeEngine, parity: Any) -> None:
    for rgb, truth in parity.truths:
        (found,) = engine.segment(engine.detect([parity.fit(rgb)], min_score=0.0))
        truth.assert_seen(found.boxes, found.scores, found.labels, found.masks / 255)


def test_each_image_of_a_batch_gets_its_own_instances(
    engine: OnnxRuntimeEngine, parity: Any
) -> None:
    images = [parity.fit(parity.draw_image(120, 160, seed=seed)) for seed in (2, 3, 4)]
    together = engine.segment(engine.detect(images, min_score=0.3))
    for image, instances in zip(images, together, strict=True):
        (alone,) = engine.segment(engine.detect([image], min_score=0.3))
        assert len(alone) == len(instances) > 0
        assert abs(alone.boxes - instances.boxes).max() < 0.01
        assert abs(alone.masks.astype(int) - instances.masks.astype(int)).max() <= 1


def test_the_default_model_runs_as_it_is(unthresholded_bundle: Bundle, parity: Any) -> None:
    engine = OnnxRuntimeEngine(unthresholded_bundle)
    (found,) = engine.segment(engine.detect([parity.fit(parity.draw_image(128, 160))], 0.0))
    assert len(found)
    assert found.masks.shape == (len(found), 28, 28)
    engine.close()


def test_a_closed_engine_says_so(unthresholded_bundle: Bundle, parity: Any) -> None:
    image = parity.fit(parity.draw_image(96, 160))
    assert_refuses_calls_when_closed(OnnxRuntimeEngine(unthresholded_bundle), [image])


def test_a_batch_of_the_wrong_size_is_refused(unthresholded_bundle: Bundle, parity: Any) -> None:
    engine = OnnxRuntimeEngine(unthresholded_bundle)
    image = parity.fit(parity.draw_image(96, 160))
    for images in ([], [image] * 9):
        with pytest.raises(ValueError, match="takes 1 to 8"):
            engine.detect(images, 0.5)


def test_poses_match_torchvision(keypoint_bundle: Bundle, parity: Any) -> None:
    engine = OnnxRuntimeEngine(keypoint_bundle, pose=True)
    assert engine.has_pose
    for rgb, truth in parity.poses:
        detections = engine.detect([parity.fit(rgb)], min_score=0.0)
        given = replace(detections, boxes=truth.boxes, image_index=np.zeros(len(truth.boxes), "i4"))
        found = engine.estimate_pose(given).keypoints
        assert found is not None
        truth.assert_posed(found)
        (instances,) = engine.segment(engine.estimate_pose(detections))
        truth.assert_seen(instances.boxes, instances.scores, instances.labels, None)
        assert instances.keypoints is not None
        assert instances.keypoints.shape == (len(instances), 17, 3)


def test_heatmaps_pass_the_filter_that_the_manifest_names(
    posing_bundle: Bundle, parity: Any
) -> None:
    assert posing_bundle.manifest.keypoint_blur_cells == 6
    sharp = Bundle(
        posing_bundle.path, replace_fields(posing_bundle.manifest, keypoint_blur_cells=0.0)
    )
    detections = OnnxRuntimeEngine(posing_bundle, pose=True).detect(
        [parity.fit(parity.draw_image(160, 224))], min_score=0.0
    )
    found = {}
    for blur_cells, bundle in ((6.0, posing_bundle), (0.0, sharp)):
        engine = OnnxRuntimeEngine(bundle, pose=True)
        found[blur_cells] = engine.estimate_pose(detections).keypoints
        inputs = {"boxes": detections.boxes, "batch_index": detections.image_index}
        assert engine._poser is not None
        (heatmaps,) = engine._poser.run(("heatmaps",), detections.features | inputs)
        np.testing.assert_array_equal(
            found[blur_cells], decode_heatmaps(heatmaps, detections.boxes, blur_cells)
        )
    assert not np.array_equal(found[0.0], found[6.0])


def test_each_image_of_a_batch_gets_its_own_pose(keypoint_bundle: Bundle, parity: Any) -> None:
    engine = OnnxRuntimeEngine(keypoint_bundle, pose=True)
    images = [parity.fit(parity.draw_image(120, 160, seed=seed)) for seed in (2, 3)]
    together = engine.segment(engine.estimate_pose(engine.detect(images, min_score=0.3)))
    for image, instances in zip(images, together, strict=True):
        (alone,) = engine.segment(engine.estimate_pose(engine.detect([image], min_score=0.3)))
        assert len(alone) == len(instances) > 0
        moved = np.abs(alone.keypoints - instances.keypoints)[..., :2].max(axis=2)
        assert (moved < 0.1).mean() > 0.97


def test_no_boxes_have_no_pose(keypoint_bundle: Bundle, parity: Any) -> None:
    engine = OnnxRuntimeEngine(keypoint_bundle, pose=True)
    nothing = engine.detect([parity.fit(parity.draw_image(64, 64))], min_score=1.0)
    (found,) = engine.segment(engine.estimate_pose(nothing))
    assert found.keypoints is not None
    assert found.keypoints.shape == (0, 17, 3)


def test_a_pose_needs_a_poser_that_is_loaded(keypoint_bundle: Bundle, parity: Any) -> None:
    engine = OnnxRuntimeEngine(keypoint_bundle)
    assert not engine.has_pose
    detections = engine.detect([parity.fit(parity.draw_image(64, 64))], min_score=0.0)
    with pytest.raises(RuntimeError, match="pose=True"):
        engine.estimate_pose(detections)
    (found,) = engine.segment(detections)
    assert found.keypoints is None
