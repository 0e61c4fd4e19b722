"""Build plans with the real TensorRT-RTX, without a GPU; failures are reported in one line."""

from __future__ import annotations

import os
import re
import shutil
import struct
from importlib.util import find_spec
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
from msgspec.structs import replace

from maskcast.builder.build import build
from maskcast.builder.graph.operators import function_bodies
from maskcast.builder.tensorrt import plans as plans_module
from maskcast.builder.tensorrt.plans import build_plans
from maskcast.builder.tensorrt.process import Built
from maskcast.engines.bundle import (
    MANIFEST,
    FixedInput,
    GraphFile,
    Graphs,
    LongestSideInput,
    Manifest,
    default_bundle,
    open_bundle,
    sha256,
)
from maskcast.engines.errors import InputError
from maskcast.engines.image import NetworkImage
from maskcast.engines.load import load_engine
from maskcast.engines.onnx_file import is_quantised
from maskcast.engines.tensorrt.plugins.library import compute_capability

needs_rtx = pytest.mark.skipif(
    find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx is not installed"
)
needs_default = pytest.mark.skipif(
    not (default_bundle() / "detector.onnx").exists(), reason="the default bundle is not built"
)
needs_no_gpu = pytest.mark.skipif(
    compute_capability() is not None, reason="tests a machine without a GPU"
)

TINY = """
<ir_version: 10, opset_import: ["" : 18, "maskcast" : 1, "elsewhere" : 1]>
tiny (float[batch, 3, h, w] images, float[batch, 2] sizes) => (float[batch, 4, h, w] p2)
<float[4, 3, 3, 3] weight = {WEIGHT}>
{
    conv = Conv <pads: ints = [1, 1, 1, 1]> (images, weight)
    p2 = OPERATOR (conv)
}
"""


def tiny_bundle(folder, operator="Relu", **changes):
    """A bundle whose detector is one convolution and one more operator."""
    folder.mkdir()
    text = TINY.replace("OPERATOR", operator).replace("WEIGHT", ", ".join(["0.5"] * 108))
    model = onnx.parser.parse_model(text)
    model.functions.extend(function_bodies(aligned=False))
    onnx.save(model, folder / "detector.onnx")
    manifest = Manifest(
        name="tiny",
        backend="tensorrt_rtx",
        precision="fp32",
        labels=("background", "thing"),
        input=FixedInput(64, 96),
        graphs=Graphs(GraphFile("detector.onnx", sha256(folder / "detector.onnx"))),
    )
    manifest = replace(manifest, **changes)
    (folder / MANIFEST).write_bytes(msgspec.json.encode(manifest))
    return open_bundle(folder)


ATTRIBUTES = {
    "output_size": "i", "sampling_ratio": "i", "aligned": "i",
    "iou_threshold": "f", "score_threshold": "f", "max_output": "i",
}  # fmt: skip
INT32, FLOAT32 = 5, 1
GRAPHS = ("detector", "segmenter", "poser")


def attributes_in(plan):
    """Read the plugins' attributes out of a serialised plan: sorted values by name.

    A record is: length of the name with its NUL, name, type, number of values, values.
    """
    found = {name: [] for name in ATTRIBUTES}
    for name, kind in ATTRIBUTES.items():
        text = name.encode() + b"\0"
        start = struct.pack("<i", len(text)) + text
        start += struct.pack("<ii", INT32 if kind == "i" else FLOAT32, 1)
        for match in re.finditer(re.escape(start), plan):
            found[name] += struct.unpack_from(f"<{kind}", plan, match.end())
    return {name: sorted(values) for name, values in found.items()}


def profiles_in(plan, *rest):
    """Read the ranges of an input out of a serialised plan: smallest, usual, largest first side.

    ``rest`` are its other sides. A shape is the number of its sides and the sides, 64 bits each;
    16 bytes lie between the three shapes of a range.
    """
    rank = struct.pack("<q", 1 + len(rest))
    sides = b"".join(struct.pack("<q", side) for side in rest)
    shape = re.escape(rank) + b"(.{8})" + re.escape(sides)
    pattern = re.compile(b".{16}".join([shape] * 3), re.DOTALL)
    return {
        tuple(struct.unpack("<q", side)[0] for side in match.groups())
        for match in pattern.finditer(plan)
    }


def build_tiny(bundle, **options):
    return build_plans(bundle.path, bundle.manifest, **options)


@pytest.fixture(scope="module", params=["fp32", "fp16", "int8"])
def default_plans(request, tmp_path_factory):
    """The default model, built for three generations of cards: bundle, reports, progress."""
    out = tmp_path_factory.mktemp("plans") / request.param
    built: dict[str, Built] = {}
    progress: list[tuple[str, int, int]] = []
    noise = np.random.default_rng(0).integers(0, 256, (2, 160, 256, 3), np.uint8)
    calibration = [NetworkImage(pixels, (160, 256), (160, 256)) for pixels in noise]
    bundle = build(
        "default",
        out,
        backend="tensorrt_rtx",
        precision=request.param,
        size=(160, 256),
        calibration=calibration if request.param == "int8" else None,
        max_batch=4,
        capabilities=("8.6", "8.9", "12.0"),
        report=lambda *step: progress.append(step),
        on_plan=built.__setitem__,
    )
    return bundle, built, progress


@needs_rtx
@needs_default
class TestDefaultModel:
    def test_it_builds_with_the_plugins_in_place(self, default_plans):
        bundle, built, _ = default_plans
        features = "FLOAT" if bundle.manifest.precision == "fp32" else "HALF"
        pooling = (features,) * 4 + ("FLOAT", "INT32")
        nms = ("FLOAT", "FLOAT", "INT32")
        assert sorted(built["detector"].plugins.values()) == sorted([nms, nms, pooling])
        assert list(built["segmenter"].plugins.values()) == [pooling]
        assert not {"NMS", "LOOP", "CONDITION", "NON_ZERO"} & set(built["detector"].layers)

    def test_every_convolution_and_product_computes_in_the_precision_asked_for(self, default_plans):
        bundle, built, _ = default_plans
        # int8: what its convolutions give, and what is not quantised.
        wanted = "FLOAT" if bundle.manifest.precision == "fp32" else "HALF"
        assert set(built["detector"].computes_in) == {wanted}
        assert set(built["segmenter"].computes_in) == {wanted}
        assert built["detector"].computes_in[wanted] > 70

    def test_int8_reaches_tensorrt_as_quantised_layers(self, default_plans):
        bundle, built, _ = default_plans
        quantised = bundle.manifest.precision == "int8"
        # One for each input of 70 convolutions and products, some of which are shared.
        assert (built["detector"].layers.get("QUANTIZE", 0) > 50) == quantised
        assert (built["segmenter"].layers.get("DEQUANTIZE", 0) == 10) == quantised

    def test_features_pass_between_the_graphs_in_one_type_and_boxes_in_float32(self, default_plans):
        bundle, built, _ = default_plans
        features = "FLOAT" if bundle.manifest.precision == "fp32" else "HALF"
        detector, segmenter = built["detector"].tensors, built["segmenter"].tensors
        for name in ("p2", "p3", "p4", "p5"):
            assert detector[name] == segmenter[name] == features
        assert {detector[name] for name in ("images", "sizes", "boxes", "scores")} == {"FLOAT"}
        assert segmenter["masks"] == "FLOAT"

    def test_the_manifest_says_what_each_plan_is_for(self, default_plans):
        bundle, built, _ = default_plans
        detector, segmenter, *_ = bundle.manifest.plans
        assert (detector.graph, segmenter.graph) == ("detector", "segmenter")
        assert detector.capabilities == ("8.6", "8.9", "12.0")
        assert detector.version == built["detector"].version
        assert (detector.height, detector.width, detector.max_batch) == (160, 256, 4)
        assert segmenter.max_boxes == 400
        assert detector.graph_sha256 == sha256(bundle.detector)
        assert detector.plugins == {"MultiscaleRoiAlign": "1", "GroupedNms": "1"}
        assert bundle.manifest.input == FixedInput(160, 256, bundle.manifest.input.pad_value)

    def test_the_plans_hold_the_attributes_of_the_graphs(self, default_plans):
        bundle, _, _ = default_plans
        for name in ("detector", "segmenter"):
            graph = onnx.load(bundle.path / f"{name}.onnx").graph
            nodes = [node for node in graph.node if node.domain == "maskcast"]
            wanted = {  # once for each of the two profiles
                attribute: sorted(
                    onnx.helper.get_attribute_value(item)
                    for node in nodes * 2
                    for item in node.attribute
                    if item.name == attribute
                )
                for attribute in ATTRIBUTES
            }
            plan = (bundle.path / f"{name}.plan").read_bytes()
            assert attributes_in(plan) == wanted, name
            assert len(wanted["output_size"]) == 2
            assert len(wanted["max_output"]) == (4 if name == "detector" else 0)

    def test_the_plans_hold_a_profile_for_every_shape_and_one_for_the_usual_ones(
        self, default_plans
    ):
        bundle, _, _ = default_plans
        plans = {name: (bundle.path / f"{name}.plan").read_bytes() for name in GRAPHS}
        assert profiles_in(plans["detector"], 3, 160, 256) == {(1, 4, 4), (1, 1, 1)}
        for name in GRAPHS[1:]:
            assert profiles_in(plans[name], 4) == {(1, 100, 400), (1, 8, 8)}, name  # boxes

    def test_the_plans_are_as_large_as_expected(self, default_plans):
        bundle, built, _ = default_plans
        megabytes = built["detector"].plan_bytes / 1e6
        bounds = {"fp32": (25, 45), "fp16": (12, 26), "int8": (12, 45)}
        low, high = bounds[bundle.manifest.precision]
        assert low < megabytes < high
        assert (bundle.path / "detector.plan").stat().st_size == built["detector"].plan_bytes

    def test_progress_time_and_memory_are_reported(self, default_plans):
        _, built, progress = default_plans
        of_tensorrt = {phase.split(":")[0] for phase, _, total in progress if total}
        assert of_tensorrt == {"detector", "segmenter", "poser"}
        assert all(0 <= done <= total for _, done, total in progress)
        assert built["detector"].build_s > 0
        assert built["detector"].peak_rss_bytes > 100e6


@needs_rtx
def test_both_graphs_of_mask_rcnn_with_resnet50_build_in_half_at_full_size(
    calibrated_bundle, tmp_path
):
    built: dict[str, Built] = {}
    bundle = build(
        calibrated_bundle.path,
        tmp_path / "gpu",
        backend="tensorrt_rtx",
        precision="fp16",
        size=(800, 1344),
        max_batch=2,
        capabilities=("8.6", "8.9", "12.0"),
        on_plan=built.__setitem__,
    )
    detector, segmenter = built["detector"], built["segmenter"]
    assert detector.computes_in == {"HALF": 80}
    # Four convolutions, the transposed one, and the product with the class's row.
    assert segmenter.computes_in == {"HALF": 6}
    assert (len(detector.plugins), len(segmenter.plugins)) == (3, 1)
    assert 80e6 < detector.plan_bytes < 110e6
    assert 4e6 < segmenter.plan_bytes < 12e6
    assert [plan.max_boxes for plan in bundle.manifest.plans] == [0, 200]


def test_the_segmenter_takes_as_many_boxes_as_the_detector_gives(tmp_path, monkeypatch):
    default = open_bundle("default")
    profiles = []

    def run(request, name, report):
        profiles.append(request.profiles)
        (tmp_path / f"{name}.plan").touch()
        none = {"layers": {}, "tensors": {}, "computes_in": {}, "plugins": {}}
        return Built(version="1.0", parse_s=0, build_s=0, peak_rss_bytes=0, plan_bytes=0, **none)

    monkeypatch.setattr(plans_module, "_run", run)
    graph = onnx.load(default.detector)
    *_, last_nms = (node for node in graph.graph.node if node.op_type == "GroupedNms")
    (most,) = (item for item in last_nms.attribute if item.name == "max_output")
    most.i = 37
    (boxes,) = (output for output in graph.graph.output if output.name == "boxes")
    boxes.type.tensor_type.shape.dim[1].dim_value = 37
    onnx.save(graph, tmp_path / "detector.onnx")
    (tmp_path / "segmenter.onnx").write_bytes(default.segmenter.read_bytes())
    manifest = replace(
        default.manifest,
        backend="tensorrt_rtx",
        precision="fp32",
        input=FixedInput(160, 256),
        graphs=replace(default.manifest.graphs, poser=None),
        keypoints=None,
    )
    made = build_plans(tmp_path, manifest, max_batch=4, capabilities=["8.6"])
    assert made.plans[1].max_boxes == 4 * 37
    any_batch, one_image = profiles[0]
    assert [shape[0] for shape in any_batch["images"]] == [1, 4, 4]
    assert [shape[0] for shape in one_image["images"]] == [1, 1, 1]
    any_boxes, few_boxes = profiles[1]
    assert any_boxes["boxes"] == ((1, 4), (37, 4), (148, 4))
    assert few_boxes["boxes"] == ((1, 4), (8, 4), (8, 4))
    for profile in profiles[1]:
        assert [shape[0] for shape in profile["p2"]] == [1, 4, 4]


def test_what_takes_one_shape_only_has_one_profile(tmp_path, monkeypatch):
    profiles = []

    def run(request, name, report):
        profiles.append(request.profiles)
        Path(request.plan).touch()
        none = {"layers": {}, "tensors": {}, "computes_in": {}, "plugins": {}}
        return Built(version="1.0", parse_s=0, build_s=0, peak_rss_bytes=0, plan_bytes=0, **none)

    monkeypatch.setattr(plans_module, "_run", run)
    build_tiny(tiny_bundle(tmp_path / "a"), max_batch=1, capabilities=["8.6"])
    ((profile,),) = profiles
    assert [shape[0] for shape in profile["images"]] == [1, 1, 1]


@needs_rtx
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_the_poser_is_built_for_the_detectors_features_and_boxes(
    posing_bundle, tmp_path, monkeypatch, precision
):
    run, built = plans_module._run, {}

    def run_poser_alone(request, name, report):
        if name == "poser":
            return run(request, name, report)
        Path(request.plan).touch()
        none = {"layers": {}, "tensors": {}, "computes_in": {}, "plugins": {}}
        return Built(version="1.0", parse_s=0, build_s=0, peak_rss_bytes=0, plan_bytes=0, **none)

    monkeypatch.setattr(plans_module, "_run", run_poser_alone)
    if precision == "int8":
        noise = np.random.default_rng(0).integers(0, 256, (160, 256, 3), np.uint8)
        images = [NetworkImage(noise, (160, 256), (160, 256))]
        posing_bundle = build(
            posing_bundle.path, tmp_path / "int8", precision="int8", calibration=images
        )
    folder = Path(shutil.copytree(posing_bundle.path, tmp_path / "bundle"))
    manifest = replace(
        posing_bundle.manifest,
        backend="tensorrt_rtx",
        precision=precision,
        input=FixedInput(160, 256),
    )
    made = build_plans(
        folder, manifest, max_batch=2, capabilities=["8.6"], on_plan=built.__setitem__
    )
    _, _, plan = made.plans
    assert (plan.graph, plan.file, plan.max_boxes) == ("poser", "poser.plan", 200)
    assert plan.graph_sha256 == posing_bundle.manifest.graphs.poser.sha256
    poser = built["poser"]
    computes = "FLOAT" if precision == "fp32" else "HALF"
    assert ("QUANTIZE" in poser.layers) == (precision == "int8")
    assert poser.computes_in == {computes: 9}  # eight convolutions and a transposed one
    assert {poser.tensors[name] for name in ("p2", "p3", "p4", "p5")} == {computes}
    assert poser.tensors["heatmaps"] == poser.tensors["boxes"] == "FLOAT"
    assert "labels" not in poser.tensors
    assert list(poser.plugins.values()) == [(computes,) * 4 + ("FLOAT", "INT32")]


@needs_default
@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_where_there_is_no_gpu_the_bundle_runs_in_the_precision_that_is_reported(
    tmp_path, monkeypatch, precision
):
    def run(request, name, report):
        Path(request.plan).write_bytes(b"a plan")
        none = {"layers": {}, "tensors": {}, "computes_in": {}, "plugins": {}}
        return Built(version="1.0", parse_s=0, build_s=0, peak_rss_bytes=0, plan_bytes=0, **none)

    monkeypatch.setattr(plans_module, "_run", run)
    bundle = build(
        "default",  # int8
        tmp_path / "out",
        backend="tensorrt_rtx",
        precision=precision,
        size=(96, 160),
        capabilities=("8.6",),
    )
    quantised = precision == "int8"
    assert is_quantised(bundle.detector) == is_quantised(bundle.segmenter) == quantised
    engine = load_engine(bundle, "openvino")
    assert engine.device == f"OpenVINO CPU {'int8' if quantised else 'fp32'}"
    engine.close()


@needs_rtx
def test_a_model_without_a_mask_branch_has_one_plan(tmp_path):
    manifest = build_tiny(tiny_bundle(tmp_path / "a"), capabilities=["8.6"])
    assert [plan.graph for plan in manifest.plans] == ["detector"]


@needs_rtx
@pytest.mark.parametrize("capability", ["9.0", "10.0", "1.7", "eight"])
def test_a_refused_capability_is_named_with_the_way_out(tmp_path, capability):
    bundle = tiny_bundle(tmp_path / "a")
    with pytest.raises(InputError, match=rf"not support {capability}.*12\.0.*--backend tensorrt"):
        build_tiny(bundle, capabilities=[capability])


@needs_rtx
def test_an_operator_that_tensorrt_does_not_know_is_named(tmp_path):
    bundle = tiny_bundle(tmp_path / "a", operator="elsewhere.Wobble")
    with pytest.raises(
        InputError, match=r"tensorrt_rtx does not support an operator of the detector: .*Wobble"
    ):
        build_tiny(bundle, capabilities=["8.6"])


@needs_no_gpu
def test_plain_tensorrt_needs_a_gpu_to_build(tmp_path):
    bundle = tiny_bundle(tmp_path / "a", backend="tensorrt")
    with pytest.raises(InputError, match="--backend tensorrt_rtx builds anywhere"):
        build_tiny(bundle)


def test_int8_needs_a_quantised_graph(tmp_path):
    bundle = tiny_bundle(tmp_path / "a", precision="int8")
    with pytest.raises(InputError, match="needs a graph with quantisation"):
        build_tiny(bundle)


def test_a_plan_needs_one_size(tmp_path):
    bundle = tiny_bundle(tmp_path / "a", input=LongestSideInput(512))
    with pytest.raises(InputError, match="--size HEIGHTxWIDTH"):
        build_tiny(bundle)


@pytest.fixture
def replace_tensorrt(tmp_path, monkeypatch):
    """Put other code in TensorRT-RTX's place in the child process."""

    def put(code):
        folder = tmp_path / "replaced"
        folder.mkdir()
        (folder / "tensorrt_rtx.py").write_text(code)
        found = [str(folder), os.environ.get("PYTHONPATH", "")]
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, found)))

    return put


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("raise ImportError('no such library')", "not installed: pip install.*no such library"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "SIGKILL.*memory may have run"),
        ("import os; os.abort()", "was killed by SIGABRT while building the detector$"),
        ("import os; print('the reason'); os._exit(3)", "exited with status 3.*the reason"),
        ("raise MemoryError", "ran out of memory.*choose a smaller --size or --batch"),
    ],
)
def test_a_build_process_that_fails_is_reported_in_one_line(
    tmp_path, replace_tensorrt, code, message
):
    replace_tensorrt(code)
    with pytest.raises(InputError, match=message) as caught:
        build_tiny(tiny_bundle(tmp_path / "a"), capabilities=["8.6"])
    assert "\n" not in str(caught.value)
