from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from PIL import Image

from maskcast.builder.build import build
from maskcast.builder.checkpoint.checkpoint import load_bundle_weights, save_model
from maskcast.builder.graph import export as export_module
from maskcast.builder.graph.quantization import is_quantised
from maskcast.builder.network.network import build_network, network_config
from maskcast.builder.training.initial import read_initial
from maskcast.engines.bundle import (
    Bundle,
    FixedInput,
    LongestSideInput,
    Manifest,
    default_bundle,
    open_bundle,
)
from maskcast.engines.errors import InputError
from maskcast.engines.instances.keypoints import COCO_PERSON
from maskcast.engines.load import load_engine
from maskcast.engines.onnxruntime import OnnxRuntimeEngine
from maskcast.engines.openvino.compiled import levels


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = network_config("lite0-fpn", ("cat", "dog"))
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("checkpoint") / "model.pth"
    save_model(path, config, build_network(config).state_dict(), {})
    return path


@pytest.fixture
def quick_export(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the exported graphs by trivial ones, for tests of everything else."""

    def graph(inputs: str, output: str) -> onnx.ModelProto:
        ports = [
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, []) for name in names]
            for names in (inputs.split(), [output])
        ]
        copy = helper.make_node("Identity", inputs.split()[:1], [output])
        return helper.make_model(helper.make_graph([copy], "copy", *ports))

    detector = graph("images sizes", "p2")
    segmenter = graph("p2 p3 p4 p5 boxes labels batch_index", "masks")
    poser = graph("p2 p3 p4 p5 boxes batch_index", "heatmaps")
    monkeypatch.setattr(export_module, "export_detector", lambda _: detector)
    monkeypatch.setattr(export_module, "export_segmenter", lambda _: segmenter)
    monkeypatch.setattr(export_module, "export_poser", lambda _: poser)


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


def test_a_bundle_with_keypoints_says_so_and_gives_its_weights_back(
    keypoint_bundle: Bundle, parity: Any
) -> None:
    manifest = keypoint_bundle.manifest
    assert manifest.keypoints == COCO_PERSON
    assert manifest.keypoint_blur_cells == 0, "positions are torchvision's"
    assert manifest.graphs.poser is not None
    assert manifest.graphs.segmenter is None
    initial = read_initial(keypoint_bundle.path, "resnet50-fpn")
    assert initial.config.keypoints == COCO_PERSON
    for key, value in parity.posing_network.state_dict().items():
        if not key.endswith("num_batches_tracked"):
            np.testing.assert_array_equal(initial.state[key], value)


def test_a_network_without_keypoints_takes_the_rest_of_a_bundle_that_has_them(
    keypoint_bundle: Bundle, parity: Any
) -> None:
    labels = keypoint_bundle.manifest.labels[1:]
    network = build_network(network_config("resnet50-fpn", labels, with_masks=False))
    load_bundle_weights(network, keypoint_bundle)
    name = "roi_heads.box_head.fc6.weight"
    assert torch.equal(network.state_dict()[name], parity.posing_network.state_dict()[name])


def test_a_poser_is_quantised_but_for_its_last_layer(
    posing_bundle: Bundle, parity: Any, tmp_path: Path
) -> None:
    images = [parity.fit(parity.draw_image(160, 224, seed)) for seed in range(2)]
    bundle = build(posing_bundle.path, tmp_path / "b", precision="int8", calibration=images)
    assert bundle.manifest.keypoints == posing_bundle.manifest.keypoints
    assert bundle.manifest.keypoint_blur_cells == posing_bundle.manifest.keypoint_blur_cells
    assert bundle.poser is not None
    assert posing_bundle.poser is not None
    assert bundle.poser.stat().st_size < 0.75 * posing_bundle.poser.stat().st_size
    made_by = {name: n for n in onnx.load(bundle.poser).graph.node for name in n.output}
    kinds = {
        (node.op_type, made_by[node.input[0]].op_type)
        for node in made_by.values()
        if node.op_type in ("Conv", "ConvTranspose")
    }
    assert kinds == {("Conv", "DequantizeLinear"), ("ConvTranspose", "Relu")}
    detections = OnnxRuntimeEngine(posing_bundle, pose=True).detect(images[:1], 0.0)
    expected, found = (
        OnnxRuntimeEngine(one, pose=True).estimate_pose(detections).keypoints
        for one in (posing_bundle, bundle)
    )
    assert expected is not None
    assert found is not None
    assert not np.array_equal(found, expected)
    apart = np.abs(found[..., :2] - expected[..., :2]).max(axis=2)
    assert (apart < 5).mean() > 0.8


def test_a_poser_stores_its_weights_in_half_the_space(
    posing_bundle: Bundle, tmp_path: Path
) -> None:
    bundle = build(posing_bundle.path, tmp_path / "b", fp16_weights=True)
    assert bundle.poser is not None
    assert posing_bundle.poser is not None
    assert bundle.poser.stat().st_size < 0.6 * posing_bundle.poser.stat().st_size


def test_the_default_bundle_loads_into_a_network() -> None:
    labels = open_bundle("default").manifest.labels[1:]
    network = build_network(network_config("lite0-fpn", labels))
    before = {key: value.clone() for key, value in network.state_dict().items()}
    load_bundle_weights(network, open_bundle("default"))
    changed = {k for k, v in network.state_dict().items() if not torch.equal(v, before[k])}
    # Norms that are folded into convolutions keep their identity.
    assert {key for key, value in before.items() if value.ndim > 1} <= changed


def test_a_bundle_of_another_network_is_recognised() -> None:
    network = build_network(network_config("lite0-fpn", ("cat", "dog")))
    with pytest.raises(InputError, match="of another network"):
        load_bundle_weights(network, open_bundle("default"))


def test_the_default_bundle_is_small() -> None:
    assert sum(file.stat().st_size for file in default_bundle().iterdir()) < 30e6


@pytest.mark.usefixtures("quick_export")
def test_a_longest_side_makes_the_input_follow_the_image(checkpoint: Path, tmp_path: Path) -> None:
    bundle = build(checkpoint, tmp_path / "b", size=512, name="pets", score_threshold=0.7)
    assert bundle.manifest.input == LongestSideInput(512, 127)
    assert bundle.manifest.name == "pets"
    assert bundle.manifest.score_threshold == 0.7
    assert bundle.manifest.labels == ("background", "cat", "dog")


def test_a_bundle_keeps_its_threshold_unless_it_is_given_another(tmp_path: Path) -> None:
    other = build("default", tmp_path / "other", precision="int8", score_threshold=0.25)
    assert other.manifest.score_threshold == 0.25
    again = build(other.path, tmp_path / "again", precision="int8")
    assert again.manifest.score_threshold == 0.25


@pytest.mark.usefixtures("quick_export")
def test_the_heatmaps_of_a_small_network_are_filtered(tmp_path: Path) -> None:
    config = network_config("lite0-fpn", ("person",), keypoints=COCO_PERSON)
    save_model(tmp_path / "m.pth", config, build_network(config).state_dict(), {})
    assert build(tmp_path / "m.pth", tmp_path / "b").manifest.keypoint_blur_cells == 6


@pytest.mark.usefixtures("quick_export")
def test_a_faster_rcnn_has_no_segmenter(tmp_path: Path) -> None:
    config = network_config("lite0-fpn", ("cat",), with_masks=False)
    save_model(tmp_path / "m.pth", config, build_network(config).state_dict(), {})
    bundle = build(tmp_path / "m.pth", tmp_path / "b")
    assert bundle.manifest.graphs.segmenter is None
    assert bundle.segmenter is None


@pytest.mark.usefixtures("quick_export")
def test_a_new_bundle_replaces_an_old_one(checkpoint: Path, tmp_path: Path) -> None:
    build(checkpoint, tmp_path / "b", name="old")
    (tmp_path / "b" / "stray").touch()
    build(checkpoint, tmp_path / "b", name="new")
    assert open_bundle(tmp_path / "b").manifest.name == "new"
    assert not (tmp_path / "b" / "stray").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


@pytest.mark.usefixtures("quick_export")
def test_a_folder_that_is_not_a_bundle_is_not_changed(checkpoint: Path, tmp_path: Path) -> None:
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
def test_an_invalid_size_is_refused(tmp_path: Path, size: Any) -> None:
    with pytest.raises(InputError, match="multiples of 32"):
        build("never read", tmp_path / "b", size=size)


@pytest.mark.parametrize(
    ("backend", "precision"),
    [("openvino", "fp16"), ("onnxruntime", "bf16"), ("tensorrt", "bf16"), ("tensorrt_rtx", "int4")],
)
def test_a_precision_that_the_backend_lacks_is_refused(
    tmp_path: Path, backend: Any, precision: str
) -> None:
    with pytest.raises(InputError, match=f"precision {precision}"):
        build("never read", tmp_path / "b", backend=backend, precision=precision)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"max_batch": 4}, "--batch: openvino does not use it"),
        ({"capabilities": ["8.6"]}, "--compute-capability: openvino does not use it"),
        ({"backend": "onnxruntime", "max_batch": 1}, "--batch: onnxruntime does not use it"),
        ({"precision": "int8", "fp16_weights": True}, "--fp16-weights: int8 weights are already"),
        ({"calibration": Path()}, "--calibration: precision fp32 does not use it"),
        ({"backend": "tensorrt_rtx", "precision": "fp16", "calibration": Path()}, "fp16 does not"),
        ({"backend": "tensorrt_rtx", "size": (100, 50)}, "multiples of 32"),
        ({"score_threshold": 1.5}, "score threshold 1.5"),
        ({"score_threshold": float("nan")}, "score threshold nan"),
    ],
)
def test_an_unsupported_option_is_refused(
    tmp_path: Path, options: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(InputError, match=complaint):
        build("never read", tmp_path / "b", **options)


def test_tensorrt_needs_one_size_and_suggests_one(float_default: Bundle, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"size 448: .*give --size HEIGHTxWIDTH, for 16:9 256x448"):
        build(float_default.path, tmp_path / "b", backend="tensorrt_rtx")
    with pytest.raises(InputError, match="size 320: "):
        build(float_default.path, tmp_path / "b", backend="tensorrt_rtx", size=320)
    assert not (tmp_path / "b").exists()


def test_a_tensorrt_bundle_applies_every_option_and_computes_in_float_on_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def build_plans(folder: Path, manifest: Manifest, **options: Any) -> Manifest:
        asked.update(options)
        assert (folder / manifest.graphs.detector.file).is_file()
        return manifest

    monkeypatch.setattr("maskcast.builder.tensorrt.plans.build_plans", build_plans)
    first = build("default", tmp_path / "sized", precision="int8", size=(96, 160))
    bundle = build(
        first.path,
        tmp_path / "gpu",
        backend="tensorrt_rtx",
        precision="fp16",
        name="people",
        labels=["human"],
        fp16_weights=True,
        score_threshold=0.25,
        max_batch=4,
        capabilities=["8.6"],
    )
    assert (asked["max_batch"], asked["capabilities"]) == (4, ["8.6"])
    manifest = bundle.manifest
    assert (manifest.backend, manifest.precision) == ("tensorrt_rtx", "fp16")
    assert (manifest.name, manifest.labels) == ("people", ("background", "human"))
    assert manifest.score_threshold == 0.25
    assert manifest.input == first.manifest.input == FixedInput(96, 160, 127)
    # The source computes in int8; the graphs that the CPU falls back to must not.
    graph = onnx.load(bundle.detector)
    assert not is_quantised(graph)
    kinds = {t.data_type for t in graph.graph.initializer if len(t.dims) == 4}
    assert kinds == {onnx.TensorProto.FLOAT16}


@pytest.mark.parametrize(
    ("labels", "complaint"),
    [
        (["cat", "dog"], "got 2, expected 1"),
        ([], "got 0, expected 1"),
        ([""], "empty or occurs twice"),
    ],
)
def test_labels_must_name_every_class(
    float_default: Bundle, tmp_path: Path, labels: list[str], complaint: str
) -> None:
    with pytest.raises(InputError, match=complaint):
        build(float_default.path, tmp_path / "b", labels=labels)


def test_a_bundle_can_be_built_again_in_place(float_default: Bundle, tmp_path: Path) -> None:
    first = build(float_default.path, tmp_path / "b", size=(96, 160))
    again = build(first.path, first.path, backend="onnxruntime")
    assert again.manifest.backend == "onnxruntime"
    assert again.manifest.input == first.manifest.input


def test_bf16_is_refused_where_the_cpu_lacks_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("maskcast.engines.openvino.engine.has_bf16", lambda: False)
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


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory, parity: Any) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for seed in range(4):
        Image.fromarray(parity.draw_people(160, 256, seed=seed)).save(folder / f"{seed}.png")
    (folder / "captions.txt").touch()
    return folder


def test_int8_computes_nearly_what_its_bundle_computes(
    float_default: Bundle, images: Path, tmp_path: Path, parity: Any
) -> None:
    coarse = build(
        float_default.path, tmp_path / "b", precision="int8", size=256, calibration=images
    )
    assert coarse.manifest.precision == "int8"
    assert coarse.manifest.labels == float_default.manifest.labels
    sizes = [bundle.detector.stat().st_size for bundle in (coarse, float_default)]
    assert sizes[0] < 0.3 * sizes[1]
    rgb = parity.draw_people(160, 256, seed=1)
    exact_engine, coarse_engine = load_engine(float_default), load_engine(coarse)
    assert coarse_engine.device == "OpenVINO CPU int8"
    image = parity.fit(rgb)
    exact, found = (engine.detect([image], 0.0) for engine in (exact_engine, coarse_engine))
    expected, given = (one.features[0].features.data for one in (exact, found))
    rows, columns = levels(image.pixels.shape[:2])["p5"]
    for level in (slice(None, -rows * columns), slice(-rows * columns, None)):
        error = given[level] - expected[level]
        assert 0 < np.sqrt((error**2).mean()) < 0.25 * np.sqrt((expected[level] ** 2).mean())
    for engine, detections in ((exact_engine, exact), (coarse_engine, found)):
        detections.release()
        engine.close()


def test_int8_keeps_the_ranges_of_a_bundle_that_has_them(
    float_default: Bundle, images: Path, tmp_path: Path
) -> None:
    first = build(float_default.path, tmp_path / "a", precision="int8", calibration=images)
    again = build(first.path, tmp_path / "b", precision="int8", size=(128, 192))
    assert again.manifest.input == FixedInput(128, 192, float_default.manifest.input.pad_value)
    assert again.manifest.graphs.detector.sha256 == first.manifest.graphs.detector.sha256


def test_int8_needs_images_and_says_so(float_default: Bundle, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--calibration"):
        build(float_default.path, tmp_path / "b", precision="int8")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("make", "complaint"), [(False, "no such folder"), (True, "no readable image")]
)
def test_a_folder_without_images_is_named(
    float_default: Bundle, tmp_path: Path, make: bool, complaint: str
) -> None:
    folder = tmp_path / "photos"
    if make:
        folder.mkdir()
    with pytest.raises(InputError, match=rf"photos: .*{complaint}"):
        build(float_default.path, tmp_path / "b", precision="int8", calibration=folder)
