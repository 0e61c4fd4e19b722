"""TensorRT's headers from a pinned wheel, with a local wheel in its place."""

from __future__ import annotations

import hashlib
import zipfile

import pytest

from maskcast.builder.tensorrt import headers
from maskcast.builder.tensorrt.headers import WHEEL, fetch_headers
from maskcast.engines.errors import InputError


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """Make a wheel of the pinned name and version, the only one that pip finds."""
    name, version = WHEEL.replace("-", "_").split("==")
    path = tmp_path / "index" / f"{name}-{version}-py3-none-any.whl"
    path.parent.mkdir()
    about = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}/include/tensorrt/NvInferRuntime.h", "// a header")
        archive.writestr(f"{name}/include/tensorrt/readme.txt", "no header")
        archive.writestr(f"{name}/__init__.py", "raise SystemExit")
        metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        archive.writestr(f"{about}/METADATA", metadata)
        archive.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
    for key, value in {"NO_INDEX": "1", "FIND_LINKS": str(path.parent)}.items():
        monkeypatch.setenv(f"PIP_{key}", value)
    return path


def test_the_headers_alone_are_taken_out_of_the_wheel(tmp_path, wheel, monkeypatch):
    monkeypatch.setattr(headers, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    fetch_headers(tmp_path / "some" / "include")
    (found,) = (tmp_path / "some" / "include").iterdir()
    assert (found.name, found.read_text()) == ("NvInferRuntime.h", "// a header")


def test_a_wheel_with_another_content_is_refused(tmp_path, wheel):
    with pytest.raises(InputError, match=r"cannot be downloaded \(kernel-lens==.*--tensorrt-head"):
        fetch_headers(tmp_path / "include")
    assert not (tmp_path / "include").exists()


def test_where_there_is_no_such_wheel_the_reason_is_one_line(tmp_path, wheel):
    wheel.unlink()
    with pytest.raises(InputError, match="No matching distribution") as caught:
        fetch_headers(tmp_path / "include")
    assert "\n" not in str(caught.value)
