from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace
from PIL import Image

from maskcast.engines import load
from maskcast.engines.bundle import Bundle, open_bundle
from maskcast.engines.engine import Engine
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


def test_engines_agree_on_an_image(unthresholded_bundle: Bundle, parity: Any) -> None:
    rgb = parity.draw_image(270, 480, seed=288)
    found = []
    for name in ("openvino", "onnxruntime"):
        engine = load_engine(unthresholded_bundle, name)
        found.append(predict(rgb, engine, min_score=0.0)[:20])
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
    rgb = parity.draw_image(270, 480, seed=288)
    everything = predict(rgb, load_engine(unthresholded_bundle), min_score=0.0)
    threshold = float(everything.scores[len(everything) // 2])
    manifest = replace(unthresholded_bundle.manifest, score_threshold=threshold)
    engine = load_engine(Bundle(unthresholded_bundle.path, manifest))
    assert len(predict(rgb, engine)) == (everything.scores >= threshold).sum() > 0
    engine.close()


@pytest.fixture(scope="module")
def default_engine() -> Iterator[Engine]:
    engine = load_engine("default")
    yield engine
    engine.close()


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((4, 4, 3), np.float32),
        np.zeros((0, 4, 3), np.uint8),
    ],
)
def test_an_array_of_another_shape_or_type_is_refused(array: Any, default_engine: Engine) -> None:
    with pytest.raises(ValueError, match=r"image: expected \[height, width, 3\] uint8, not \["):
        predict(array, default_engine)


def test_predict_names_the_argument_that_is_wrong(default_engine: Engine, tmp_path: Path) -> None:
    rgb = np.zeros((64, 64, 3), np.uint8)
    wrong: Any = None
    with pytest.raises(TypeError, match=r"the image comes first: predict\(image, engine\)"):
        predict(default_engine, rgb)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"image: expected a path.*, not NoneType"):
        predict(wrong, default_engine)
    with pytest.raises(TypeError, match=r"model: expected an engine.*, not NoneType"):
        predict(rgb, wrong)
    with pytest.raises(ValueError, match=r"min_score: expected 0\.\.1, not 80"):
        predict(rgb, default_engine, 80)
    with pytest.raises(InputError, match=r"nowhere\.jpg: no such image"):
        predict(tmp_path / "nowhere.jpg", default_engine)
    with pytest.raises(InputError, match="nowhere: not a bundle"):
        predict(rgb, str(tmp_path / "nowhere"))


def test_predict_takes_a_file_an_array_or_a_pillow_image(
    unthresholded_bundle: Bundle, parity: Any, tmp_path: Path
) -> None:
    rgb = parity.draw_image(270, 480, seed=288)
    lying = Image.fromarray(np.rot90(rgb))
    lying.getexif()[0x0112] = 6  # to be turned clockwise
    lying.save(tmp_path / "photo.png", exif=lying.getexif())
    engine = load_engine(unthresholded_bundle)
    expected = predict(rgb, engine, 0.0)
    assert len(expected)
    for image in (
        tmp_path / "photo.png",
        str(tmp_path / "photo.png"),
        Image.open(tmp_path / "photo.png"),
        Image.fromarray(rgb).convert("RGBA"),
    ):
        found = predict(image, engine, 0.0)
        np.testing.assert_array_equal(found.boxes, expected.boxes)
        assert (found.width, found.height) == (480, 270)
    engine.close()


def test_predict_loads_a_bundle_once(unthresholded_bundle: Bundle) -> None:
    rgb = np.zeros((64, 64, 3), np.uint8)
    assert predict(rgb).width == 64
    kept = load._kept_engine._engine
    predict(rgb, "default")
    assert load._kept_engine._engine is kept
    predict(rgb, unthresholded_bundle)
    assert load._kept_engine._engine is not kept


def test_an_engine_is_described_on_one_line(default_engine: Engine) -> None:
    assert repr(default_engine) == (
        "<OpenVinoEngine 'person-lite0' on OpenVINO CPU int8, batch up to 1>"
    )


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
def test_a_poser_is_loaded_only_on_request(posing_bundle: Bundle, engine: str) -> None:
    for pose in (False, True):
        loaded = load_engine(posing_bundle, engine, pose=pose)
        assert loaded.has_pose is pose
        loaded.close()


def test_a_pose_of_a_bundle_without_a_poser_is_refused(unthresholded_bundle: Bundle) -> None:
    with pytest.raises(InputError, match="this model finds no keypoints; run it without pose"):
        load_engine(unthresholded_bundle, pose=True)


def test_predict_estimates_poses_of_a_bundle_and_of_an_engine_that_was_loaded_for_it(
    posing_bundle: Bundle, parity: Any
) -> None:
    rgb = parity.draw_image(64, 96)
    found = predict(rgb, posing_bundle, 0.0, pose=True)
    assert found.keypoints is not None
    assert found.keypoints.shape == (len(found), 17, 3)
    assert predict(rgb, posing_bundle, 0.0).keypoints is None
    engine = load_engine(posing_bundle, "onnxruntime")
    with pytest.raises(ValueError, match=r"loaded without; use load_engine\(..., pose=True\)"):
        predict(rgb, engine, pose=True)
    engine.close()
