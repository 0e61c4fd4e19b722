from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper

import builder.build
from builder.build import build
from builder.checkpoint import load_bundle_weights, save_model
from builder.network import build_network, network_config
from engines.bundle import Bundle, LongestSideInput, default_bundle, open_bundle
from engines.errors import InputError


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = network_config("lite0-fpn", ("cat", "dog"))
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("checkpoint") / "model.pth"
    save_model(path, config, build_network(config).state_dict(), {})
    return path


@pytest.fixture
def quick_export(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs that say nothing, for tests of what surrounds them."""

    def export(network: Any) -> onnx.ModelProto:
        return helper.make_model(helper.make_graph([], "empty", [], []))

    monkeypatch.setattr(builder.build, "export_detector", export)
    monkeypatch.setattr(builder.build, "export_segmenter", export)


def test_a_bundle_says_what_it_is(calibrated_bundle: Bundle) -> None:
    manifest = calibrated_bundle.manifest
    assert manifest.name == "bundle"
    assert manifest.labels == ("background", *"abcdefghijklmnopqrst")
    assert (manifest.backend, manifest.precision) == ("openvino", "fp32")
    assert manifest.input.shape(320, 576) == ((320, 576), (320, 576))
    assert manifest.input.pad_value == round((0.485 + 0.456 + 0.406) / 3 * 255)
    assert manifest.graphs.segmenter is not None
    assert {"maskcast", "torch", "torchvision", "onnx"} <= manifest.built_with.keys()


def test_a_bundle_gives_its_weights_back(calibrated_bundle: Bundle, parity: Any) -> None:
    network = build_network(network_config("resnet50-fpn", tuple("abcdefghijklmnopqrst")))
    load_bundle_weights(network, calibrated_bundle)
    for key, value in parity.network.state_dict().items():
        if not key.endswith("num_batches_tracked"):
            np.testing.assert_array_equal(network.state_dict()[key], value)


def test_the_default_bundle_turns_back_into_a_network() -> None:
    labels = open_bundle("default").manifest.labels[1:]
    network = build_network(network_config("lite0-fpn", labels))
    before = {key: value.clone() for key, value in network.state_dict().items()}
    load_bundle_weights(network, open_bundle("default"))
    changed = {k for k, v in network.state_dict().items() if not torch.equal(v, before[k])}
    assert {key for key in before if key.endswith("weight")} <= changed


def test_a_bundle_of_another_network_is_told_apart() -> None:
    network = build_network(network_config("lite0-fpn", ("cat", "dog")))
    with pytest.raises(InputError, match="of another network"):
        load_bundle_weights(network, open_bundle("default"))


def test_the_default_bundle_is_small() -> None:
    assert sum(file.stat().st_size for file in default_bundle().iterdir()) < 30e6


@pytest.mark.usefixtures("quick_export")
def test_a_longest_side_makes_the_input_follow_the_picture(
    checkpoint: Path, tmp_path: Path
) -> None:
    bundle = build(checkpoint, tmp_path / "b", size=512, name="pets", score_threshold=0.7)
    assert bundle.manifest.input == LongestSideInput(512, 127)
    assert bundle.manifest.name == "pets"
    assert bundle.manifest.score_threshold == 0.7
    assert bundle.manifest.labels == ("background", "cat", "dog")


@pytest.mark.usefixtures("quick_export")
def test_a_faster_rcnn_has_no_segmenter(tmp_path: Path) -> None:
    config = network_config("lite0-fpn", ("cat",), with_masks=False)
    save_model(tmp_path / "m.pth", config, build_network(config).state_dict(), {})
    bundle = build(tmp_path / "m.pth", tmp_path / "b")
    assert bundle.manifest.graphs.segmenter is None
    assert bundle.segmenter is None


@pytest.mark.usefixtures("quick_export")
def test_a_new_bundle_takes_the_place_of_an_old_one(checkpoint: Path, tmp_path: Path) -> None:
    build(checkpoint, tmp_path / "b", name="old")
    (tmp_path / "b" / "stray").touch()
    build(checkpoint, tmp_path / "b", name="new")
    assert open_bundle(tmp_path / "b").manifest.name == "new"
    assert not (tmp_path / "b" / "stray").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


@pytest.mark.usefixtures("quick_export")
def test_a_folder_that_is_no_bundle_is_left_alone(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").touch()
    with pytest.raises(InputError, match="not a bundle"):
        build(checkpoint, tmp_path / "photos")
    assert (tmp_path / "photos" / "cat.jpg").exists()


@pytest.mark.usefixtures("quick_export")
def test_a_full_disk_leaves_the_old_bundle_and_nothing_else(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(checkpoint, tmp_path / "b", name="old")

    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(onnx, "save", fail)
    with pytest.raises(InputError, match="No space left"):
        build(checkpoint, tmp_path / "b", name="new")
    assert open_bundle(tmp_path / "b").manifest.name == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


@pytest.mark.parametrize("size", [(800, 1333), (32, 64), 500, 0, 8192, (-320, 576)])
def test_a_size_that_is_not_sensible_is_refused(tmp_path: Path, size: Any) -> None:
    with pytest.raises(InputError, match="multiples of 32"):
        build("never read", tmp_path / "b", size=size)


@pytest.mark.parametrize(
    ("backend", "precision"), [("openvino", "fp16"), ("onnxruntime", "bf16"), ("tensorrt", "bf16")]
)
def test_a_precision_that_the_backend_lacks_is_refused(
    tmp_path: Path, backend: Any, precision: str
) -> None:
    with pytest.raises(InputError, match=f"precision {precision}"):
        build("never read", tmp_path / "b", backend=backend, precision=precision)


def test_bf16_is_refused_where_the_cpu_lacks_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engines.openvino.has_bf16", lambda: False)
    with pytest.raises(InputError, match="choose fp32"):
        build("never read", tmp_path / "b", precision="bf16")


def test_a_missing_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.pth"):
        build(tmp_path / "nowhere.pth", tmp_path / "b")


def test_a_checkpoint_of_another_architecture_is_refused(tmp_path: Path) -> None:
    torch.save({"layer.weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(InputError, match=r"other\.pth"):
        build(tmp_path / "other.pth", tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_halved_weights_halve_the_file_and_keep_their_values(
    checkpoint: Path, tmp_path: Path
) -> None:
    bundle = build(checkpoint, tmp_path / "b", fp16_weights=True)
    network = build_network(network_config("lite0-fpn", ("cat", "dog")))
    assert bundle.detector.stat().st_size < 16e6
    load_bundle_weights(network, bundle)
    saved = torch.load(checkpoint, weights_only=True)["model"]
    for key, value in network.state_dict().items():
        np.testing.assert_allclose(value, saved[key], rtol=1e-3, atol=1e-7)
