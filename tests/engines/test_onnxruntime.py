from __future__ import annotations

from typing import Any

import pytest

from maskcast.engines.bundle import Bundle
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
    images = [parity.fit(parity.draw_picture(120, 160, seed=seed)) for seed in (2, 3, 4)]
    together = engine.segment(engine.detect(images, min_score=0.3))
    for image, instances in zip(images, together, strict=True):
        (alone,) = engine.segment(engine.detect([image], min_score=0.3))
        assert len(alone) == len(instances) > 0
        assert abs(alone.boxes - instances.boxes).max() < 0.01
        assert abs(alone.masks.astype(int) - instances.masks.astype(int)).max() <= 1


def test_the_default_model_runs_as_it_is(unthresholded_bundle: Bundle, parity: Any) -> None:
    engine = OnnxRuntimeEngine(unthresholded_bundle)
    (found,) = engine.segment(engine.detect([parity.fit(parity.draw_picture(128, 160))], 0.0))
    assert len(found)
    assert found.masks.shape == (len(found), 28, 28)
    engine.close()
