from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from maskcast.engines.bundle import Bundle, open_bundle
from maskcast.engines.errors import InputError
from maskcast.engines.load import load_engine, predict


@pytest.mark.parametrize(
    ("engine", "device"), [("auto", "OpenVINO"), ("openvino", "OpenVINO"), ("onnxruntime", "ONNX")]
)
def test_an_engine_is_chosen_by_name(engine: str, device: str) -> None:
    loaded = load_engine("default", engine)
    assert loaded.device.startswith(device)
    assert loaded.manifest == open_bundle("default").manifest
    loaded.close()


def test_auto_takes_the_backend_of_the_bundle() -> None:
    bundle = open_bundle("default")
    other = Bundle(bundle.path, replace(bundle.manifest, backend="onnxruntime"))
    assert load_engine(other).device.startswith("ONNX")


def test_an_unknown_engine_is_refused_in_one_line() -> None:
    with pytest.raises(InputError, match="'cuda': choose one of auto, openvino"):
        load_engine("default", "cuda")


def test_a_bundle_for_another_backend_says_what_to_do() -> None:
    with pytest.raises(InputError, match="--backend tensorrt"):
        load_engine("default", "tensorrt")


def test_engines_agree_on_a_picture(unthresholded_bundle: Bundle, parity: Any) -> None:
    rgb = parity.draw_picture(270, 480, seed=288)
    found = []
    for name in ("openvino", "onnxruntime"):
        engine = load_engine(unthresholded_bundle, name)
        found.append(predict(engine, rgb, min_score=0.0)[:20])
        engine.close()
    one, other = found
    assert len(one) == len(other) > 0
    assert (one.width, one.height) == (480, 270)
    np.testing.assert_allclose(one.boxes, other.boxes, atol=0.1)
    np.testing.assert_allclose(one.scores, other.scores, atol=1e-3)
    np.testing.assert_allclose(one.masks.astype(int), other.masks.astype(int), atol=3)


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
def test_the_device_names_the_precision_that_runs(engine: str, float_default: Bundle) -> None:
    for bundle, runs in ((open_bundle("default"), "int8"), (float_default, "fp32")):
        for said in ("fp32", "fp16", "int8"):
            manifest = replace(bundle.manifest, precision=said)
            loaded = load_engine(Bundle(bundle.path, manifest), engine)
            assert loaded.device.endswith(f"CPU {runs}")
            loaded.close()


def test_the_bundles_own_threshold_is_the_default(
    unthresholded_bundle: Bundle, parity: Any
) -> None:
    rgb = parity.draw_picture(270, 480, seed=288)
    everything = predict(load_engine(unthresholded_bundle), rgb, min_score=0.0)
    threshold = float(everything.scores[len(everything) // 2])
    manifest = replace(unthresholded_bundle.manifest, score_threshold=threshold)
    engine = load_engine(Bundle(unthresholded_bundle.path, manifest))
    assert len(predict(engine, rgb)) == (everything.scores >= threshold).sum() > 0
    engine.close()


@pytest.mark.parametrize(
    "picture",
    [
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((4, 4, 3), np.float32),
        np.zeros((0, 4, 3), np.uint8),
    ],
)
def test_what_is_no_picture_is_refused(picture: Any) -> None:
    engine = load_engine("default")
    with pytest.raises(ValueError, match="uint8"):
        predict(engine, picture)
    engine.close()
