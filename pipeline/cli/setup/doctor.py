"""``maskcast doctor``: what is installed here, and which backends and codecs work."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from importlib.util import find_spec
from typing import NamedTuple

import av

import maskcast

BUILDER_PACKAGES = ("torch", "torchvision", "onnx", "onnxscript", "onnxruntime")
DECODERS = ("h264", "hevc", "mjpeg", "vp9", "av1")


class Finding(NamedTuple):
    """One line of the report: what was examined, whether it can be used, and details."""

    name: str
    usable: bool
    detail: str


def examine() -> list[Finding]:
    """Examine this machine and this installation. Missing packages are reported, not imported."""
    return [
        Finding(
            "maskcast",
            True,
            f"{maskcast.__version__}, Python {platform.python_version()}, "
            f"{platform.system()} {platform.machine()}, {len(os.sched_getaffinity(0))} cores",
        ),
        _openvino(),
        _default_model(),
        _package("onnxruntime", "the reference backend; pip install 'maskcast[onnxruntime]'"),
        _tensorrt("tensorrt", "tensorrt"),
        _tensorrt("tensorrt_rtx", "rtx"),
        _gpu(),
        _codecs("decode", [name for name in DECODERS if _has_codec(name, "r")], DECODERS),
        _codecs("encode", ["libx264"] if _has_codec("libx264", "w") else [], ("libx264",)),
        _builder(),
    ]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package.replace("_", "-"))
    except importlib.metadata.PackageNotFoundError:
        return "version unknown"


def _package(name: str, missing: str) -> Finding:
    if find_spec(name) is None:
        return Finding(name, False, f"not installed: {missing}")
    return Finding(name, True, _version(name))


def _openvino() -> Finding:
    from maskcast.engines.openvino.engine import openvino_core

    core = openvino_core()
    able = set(core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"))
    fast = [
        name
        for name, flag in (("int8", "INT8"), ("bf16", "BF16"), ("fp16", "FP16"))
        if flag in able
    ]
    cpu = core.get_property("CPU", "FULL_DEVICE_NAME").strip()
    return Finding("openvino", True, f"{_version('openvino')}, {cpu}: fp32 {' '.join(fast)}")


def _default_model() -> Finding:
    from maskcast.engines.bundle import open_bundle

    manifest = open_bundle("default").manifest
    labels = ", ".join(manifest.labels[1:])
    return Finding("default model", True, f"{manifest.name}, {manifest.precision}, finds {labels}")


def _tensorrt(package: str, extra: str) -> Finding:
    if find_spec(package) is None:
        return Finding(package, False, f"not installed: pip install 'maskcast[{extra}]'")
    if find_spec("pycuda") is None:
        return Finding(package, False, f"{_version(package)}, but pycuda is not installed")
    return Finding(package, True, _version(package))


def _gpu() -> Finding:
    from maskcast.engines.tensorrt.plugins.library import compute_capability, driver_incompatibility

    found = compute_capability()
    if found is None:
        return Finding("NVIDIA GPU", False, "no GPU or no NVIDIA driver")
    if (problem := driver_incompatibility()) is not None:
        return Finding("NVIDIA GPU", False, problem)
    return Finding("NVIDIA GPU", True, "compute capability {}.{}".format(*found))


def _has_codec(name: str, mode: str) -> bool:
    try:
        av.Codec(name, mode)  # type: ignore[arg-type]
    except (av.codec.codec.UnknownCodecError, ValueError):
        return False
    return True


def _codecs(name: str, found: list[str], wanted: tuple[str, ...]) -> Finding:
    missing = [codec for codec in wanted if codec not in found]
    detail = f"PyAV {av.__version__}: {' '.join(found) or 'none'}"
    return Finding(name, bool(found), detail + (f"; missing: {' '.join(missing)}" * bool(missing)))


def _builder() -> Finding:
    missing = [package for package in BUILDER_PACKAGES if find_spec(package) is None]
    if missing:
        needed = f"build, train and eval need {', '.join(missing)}: pip install 'maskcast[builder]'"
        return Finding("builder", False, needed)
    return Finding("builder", True, f"torch {_version('torch')}: build, train and eval work")


def report() -> str:
    """Return the findings as text, one per line."""
    findings = examine()
    width = max(len(finding.name) for finding in findings)
    return "\n".join(
        f"{'ok' if finding.usable else '--'}  {finding.name:{width}}  {finding.detail}"
        for finding in findings
    )
