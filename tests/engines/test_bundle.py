from __future__ import annotations

import contextlib
import json
import os
import re
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from maskcast.engines.bundle import (
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
from maskcast.engines.instances.keypoints import COCO_PERSON
from maskcast.engines.load import load_engine

DETECTOR = """
<ir_version: 10, opset_import: ["" : 18]>
detector (float[n, 3, h, w] images, float[n, 2] sizes) => (float[n, 3, h, w] p2)
<float[1] factor = {2.0}> { p2 = Mul (images, factor) }
"""
SEGMENTER = """
<ir_version: 10, opset_import: ["" : 18]>
segmenter (float[n] p2, float[n] p3, float[n] p4, float[n] p5, float[r, 4] boxes, int64[r] labels,
           int32[r] batch_index) => (float[r, 4] masks) { masks = Identity (boxes) }
"""
POSER = """
<ir_version: 10, opset_import: ["" : 18]>
poser (float[n] p2, float[n] p3, float[n] p4, float[n] p5, float[r, 4] boxes,
       int32[r] batch_index) => (float[r, 4] heatmaps) { heatmaps = Identity (boxes) }
"""


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """Return a bundle whose graphs have the right inputs and compute nothing useful."""
    files = {}
    for role, text in (("detector", DETECTOR), ("segmenter", SEGMENTER)):
        path = tmp_path / f"{role}.onnx"
        onnx.save(onnx.parser.parse_model(text), path)
        files[role] = GraphFile(path.name, sha256(path))
    manifest = Manifest(
        name="cats",
        backend="openvino",
        precision="fp32",
        labels=("background", "cat"),
        input=LongestSideInput(512, 127),
        graphs=Graphs(**files),
    )
    (tmp_path / "manifest.json").write_bytes(msgspec.json.encode(manifest))
    return tmp_path


def edit(bundle: Path, **values: Any) -> None:
    path = bundle / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_a_bundle_is_read_as_it_was_written(bundle: Path) -> None:
    opened = open_bundle(bundle)
    assert opened.manifest.labels == ("background", "cat")
    assert opened.manifest.input == LongestSideInput(512, 127)
    assert opened.detector == bundle / "detector.onnx"
    assert opened.segmenter == bundle / "segmenter.onnx"
    assert opened.manifest == open_bundle(str(bundle)).manifest


@pytest.fixture
def posing(bundle: Path) -> Path:
    """Return the same bundle with a poser."""
    path = bundle / "poser.onnx"
    onnx.save(onnx.parser.parse_model(POSER), path)
    graphs = json.loads((bundle / "manifest.json").read_text())["graphs"]
    graphs["poser"] = {"file": path.name, "sha256": sha256(path)}
    edit(bundle, graphs=graphs, keypoints=msgspec.to_builtins(COCO_PERSON))
    return bundle


def test_a_bundle_with_a_poser_says_what_it_finds(posing: Path) -> None:
    opened = open_bundle(posing)
    assert opened.poser == posing / "poser.onnx"
    assert list(opened.manifest.graphs.present) == ["detector", "segmenter", "poser"]
    assert opened.manifest.keypoints == COCO_PERSON


def test_a_bundle_from_before_keypoints_has_none(bundle: Path) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    del manifest["keypoints"], manifest["graphs"]["poser"]
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    opened = open_bundle(bundle)
    assert opened.poser is None
    assert list(opened.manifest.graphs.present) == ["detector", "segmenter"]
    assert opened.manifest.keypoints is None


def test_keypoints_without_a_poser_are_damage(posing: Path) -> None:
    edit(posing, keypoints=None)
    with pytest.raises(InputError, match=r"damaged .*keypoints need a poser"):
        open_bundle(posing)


def test_a_skeleton_of_points_that_are_not_there_is_damage(posing: Path) -> None:
    edit(posing, keypoints={"names": ["nose"], "skeleton": [[0, 1]]})
    with pytest.raises(InputError, match=r"damaged .*skeleton"):
        open_bundle(posing)


def test_a_poser_is_checked_as_the_other_graphs(posing: Path) -> None:
    path = posing / "poser.onnx"
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with pytest.raises(InputError, match=r"poser\.onnx: damaged"):
        open_bundle(posing)
    replace_graph(posing, "poser", (posing / "segmenter.onnx").read_bytes())
    with pytest.raises(InputError, match=r"poser\.onnx: not the expected graph"):
        open_bundle(posing)


def test_the_default_bundle_comes_with_the_package() -> None:
    opened = open_bundle("default")
    assert opened.path == default_bundle()
    assert opened.manifest.labels[0] == "background"


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere: not a bundle \(no such folder\)"):
        open_bundle(tmp_path / "nowhere")


def test_a_folder_without_a_manifest_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no manifest\.json"):
        open_bundle(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"format": "one"}', b"\xff\xfe"])
def test_a_damaged_manifest_is_reported_in_one_line(bundle: Path, content: bytes) -> None:
    (bundle / "manifest.json").write_bytes(content)
    with pytest.raises(InputError, match="damaged") as caught:
        open_bundle(bundle)
    assert "\n" not in str(caught.value)


def test_a_manifest_that_lacks_a_field_is_damaged(bundle: Path) -> None:
    content = json.loads((bundle / "manifest.json").read_text())
    del content["labels"]
    (bundle / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="labels"):
        open_bundle(bundle)


def test_another_format_is_not_reported_as_damage(bundle: Path) -> None:
    edit(bundle, format=2, labels="something new")
    with pytest.raises(InputError, match="format 2"):
        open_bundle(bundle)


@pytest.mark.parametrize(
    "name", ["../detector.onnx", "/dev/zero", "a/b.onnx", "..", ".", "", "a b", "x" * 300, "a\n"]
)
def test_a_file_outside_of_the_folder_is_refused(bundle: Path, name: str) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["graphs"]["detector"]["file"] = name
    edit(bundle, **manifest)
    with pytest.raises(InputError, match=r"manifest\.json: damaged .*graphs\.detector\.file"):
        open_bundle(bundle)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("file", ["detector.onnx", "manifest.json"])
@pytest.mark.parametrize("kind", ["link", "device", "fifo", "folder"])
def test_only_regular_files_are_opened(bundle: Path, file: str, kind: str) -> None:
    path = bundle / file
    elsewhere = path.rename(bundle / "elsewhere")
    match kind:
        case "link":
            path.symlink_to(elsewhere)
        case "device":
            path.symlink_to("/dev/zero")
        case "fifo":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
    with pytest.raises(InputError, match=rf"{file}: cannot be read \(.+\); build") as caught:
        open_bundle(bundle)
    assert "\n" not in str(caught.value)


def test_a_manifest_that_is_too_large_is_not_read(bundle: Path) -> None:
    with (bundle / "manifest.json").open("ab") as file:
        file.truncate(1 << 30)
    with pytest.raises(InputError, match="larger than 1 MiB"):
        open_bundle(bundle)


def test_a_manifest_that_is_nested_too_deep_is_damaged(bundle: Path) -> None:
    (bundle / "manifest.json").write_bytes(b'{"format": ' + b"[" * 100_000)
    with pytest.raises(InputError, match="damaged"):
        open_bundle(bundle)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("input.longest_side", value) for value in (0, -32, 100, 10**9)),
        *(("input.pad_value", value) for value in (-1, 256)),
        *(("score_threshold", value) for value in (-0.1, 1.1)),
        ("precision", "fp7"),
        ("labels", []),
        ("labels", ["x"] * 10_001),
        ("labels", ["x" * 256]),
        ("name", "x" * 256),
        ("backend", "cuda"),
        ("graphs.detector.sha256", "0"),
        ("built_with", {str(number): "" for number in range(101)}),
    ],
)
def test_a_value_out_of_range_is_named(bundle: Path, field: str, value: Any) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    *parents, last = field.split(".")
    place = manifest
    for parent in parents:
        place = place[parent]
    place[last] = value
    edit(bundle, **manifest)
    with pytest.raises(InputError, match=rf"damaged .*`\$\.{re.escape(field)}") as caught:
        open_bundle(bundle)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def replace_graph(bundle: Path, role: str, content: bytes) -> None:
    path = bundle / f"{role}.onnx"
    path.write_bytes(content)
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["graphs"][role]["sha256"] = sha256(path)
    edit(bundle, **manifest)


@pytest.mark.parametrize("content", [b"", b"node { op: 'Const' }", bytes(1000), b"\x3a\xff\x01"])
def test_a_graph_that_is_no_onnx_model_is_refused(bundle: Path, content: bytes) -> None:
    replace_graph(bundle, "detector", content)
    with pytest.raises(InputError, match=r"detector\.onnx: not an ONNX model; build"):
        open_bundle(bundle)


def test_every_truncation_of_a_graph_is_refused(bundle: Path) -> None:
    content = (bundle / "detector.onnx").read_bytes()
    for length in range(len(content)):
        replace_graph(bundle, "detector", content[:length])
        with contextlib.suppress(InputError):
            open_bundle(bundle)
            # The fields after the graph may be missing: the library that runs it reports that.
            assert onnx.load(bundle / "detector.onnx").graph.output


def test_swapped_graphs_are_refused(bundle: Path) -> None:
    detector, segmenter = (bundle / f"{role}.onnx" for role in ("detector", "segmenter"))
    contents = detector.read_bytes(), segmenter.read_bytes()
    replace_graph(bundle, "detector", contents[1])
    replace_graph(bundle, "segmenter", contents[0])
    with pytest.raises(InputError, match="not the expected graph") as caught:
        open_bundle(bundle)
    assert "\n" not in str(caught.value)


def external(model: onnx.ModelProto) -> onnx.TensorProto:
    tensor = onnx.numpy_helper.from_array(np.ones(4, np.float32), "factor")
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="weights.bin")
    return tensor


@pytest.mark.parametrize("place", ["initializer", "attribute", "subgraph", "function"])
def test_weights_in_other_files_are_refused(bundle: Path, place: str) -> None:
    model = onnx.load(bundle / "detector.onnx")
    tensor = external(model)
    constant = onnx.helper.make_node("Constant", [], ["c"], value=tensor)
    match place:
        case "initializer":
            model.graph.initializer.append(tensor)
        case "attribute":
            model.graph.node.append(constant)
        case "subgraph":
            branch = onnx.helper.make_graph([constant], "branch", [], [])
            model.graph.node.add(op_type="If").attribute.append(
                onnx.helper.make_attribute("then_branch", branch)
            )
        case "function":
            model.functions.add(name="f").node.append(constant)
    replace_graph(bundle, "detector", model.SerializeToString())
    with pytest.raises(InputError, match="its weights are in other files"):
        open_bundle(bundle)


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
def test_a_graph_that_an_engine_cannot_read_is_reported_in_one_line(
    bundle: Path, engine: str
) -> None:
    model = onnx.load(bundle / "detector.onnx")
    model.graph.node[0].op_type = "NoSuchOperator"
    replace_graph(bundle, "detector", model.SerializeToString())
    with pytest.raises(InputError, match=r"detector\.onnx: .*; build the bundle again") as caught:
        load_engine(bundle, engine)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("role", ["detector", "segmenter"])
def test_a_truncated_graph_is_found(bundle: Path, role: str) -> None:
    path = bundle / f"{role}.onnx"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match=rf"{role}\.onnx: damaged"):
        open_bundle(bundle)


def test_a_missing_graph_is_found(bundle: Path) -> None:
    (bundle / "segmenter.onnx").unlink()
    with pytest.raises(InputError, match=r"segmenter\.onnx: cannot be read"):
        open_bundle(bundle)


@pytest.mark.parametrize(
    ("image", "shape", "content"),
    [
        ((1080, 1920), (288, 512), (288, 512)),
        ((1920, 1080), (512, 288), (512, 288)),
        ((480, 640), (384, 512), (384, 512)),
        ((385, 512), (416, 512), (385, 512)),
        ((1, 1), (512, 512), (512, 512)),
        ((1, 8000), (64, 512), (1, 512)),
        ((100, 100), (512, 512), (512, 512)),
    ],
)
def test_the_longest_side_is_kept(
    image: tuple[int, int], shape: tuple[int, int], content: tuple[int, int]
) -> None:
    assert LongestSideInput(512).shape(*image) == (shape, content)


@pytest.mark.parametrize(
    ("image", "content"),
    [
        ((1080, 1920), (320, 569)),
        ((1920, 1080), (320, 180)),
        ((100, 1000), (58, 576)),
        ((1, 1), (320, 320)),
        ((1, 8000), (1, 576)),
    ],
)
def test_a_fixed_shape_holds_the_whole_image(
    image: tuple[int, int], content: tuple[int, int]
) -> None:
    assert FixedInput(320, 576).shape(*image) == ((320, 576), content)


SIDES = st.integers(1, 9000)


@given(height=SIDES, width=SIDES, side=st.integers(2, 60).map(lambda n: 32 * n))
def test_content_always_fits_and_padding_is_less_than_a_stride(
    height: int, width: int, side: int
) -> None:
    for given_input in (LongestSideInput(side), FixedInput(side, 2 * side)):
        (rows, columns), (content_rows, content_columns) = given_input.shape(height, width)
        assert rows % 32 == columns % 32 == 0
        assert 1 <= content_rows <= rows
        assert 1 <= content_columns <= columns
    (rows, columns), (content_rows, content_columns) = LongestSideInput(side).shape(height, width)
    assert max(content_rows, content_columns) == side
    assert rows - content_rows < 32 or rows == 64
    assert columns - content_columns < 32 or columns == 64
