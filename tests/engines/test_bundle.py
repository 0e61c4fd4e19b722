from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
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


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A bundle in form; its graphs are any bytes."""
    files = {}
    for role in ("detector", "segmenter"):
        path = tmp_path / f"{role}.onnx"
        path.write_bytes(role.encode() * 1000)
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
def test_a_damaged_manifest_is_one_line(bundle: Path, content: bytes) -> None:
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


def test_another_format_is_told_from_damage(bundle: Path) -> None:
    edit(bundle, format=2, labels="something new")
    with pytest.raises(InputError, match="format 2"):
        open_bundle(bundle)


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
    ("picture", "shape", "content"),
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
    picture: tuple[int, int], shape: tuple[int, int], content: tuple[int, int]
) -> None:
    assert LongestSideInput(512).shape(*picture) == (shape, content)


@pytest.mark.parametrize(
    ("picture", "content"),
    [
        ((1080, 1920), (320, 569)),
        ((1920, 1080), (320, 180)),
        ((100, 1000), (58, 576)),
        ((1, 1), (320, 320)),
        ((1, 8000), (1, 576)),
    ],
)
def test_a_fixed_shape_holds_the_whole_picture(
    picture: tuple[int, int], content: tuple[int, int]
) -> None:
    assert FixedInput(320, 576).shape(*picture) == ((320, 576), content)


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
