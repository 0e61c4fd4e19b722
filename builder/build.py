"""From a checkpoint to a bundle."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import onnx
from msgspec.structs import replace
from onnx import ModelProto

from maskcast.builder.bundle_writer import check_bundle_folder, new_bundle, write_manifest
from maskcast.builder.graph.folding import halve_weights
from maskcast.builder.graph.quantization import is_quantised, quantise_graphs, restore_float
from maskcast.builder.images import read_calibration_images
from maskcast.engines.bundle import (
    Bundle,
    FixedInput,
    GraphFile,
    Graphs,
    LongestSideInput,
    Manifest,
    is_bundle,
    open_bundle,
    sha256,
)
from maskcast.engines.errors import InputError

Backend = Literal["openvino", "onnxruntime"]
"""What runs the portable graphs; for TensorRT see ``maskcast.builder.tensorrt.plans``."""
PRECISIONS: dict[Backend, tuple[str, ...]] = {
    "openvino": ("fp32", "bf16", "int8"),
    "onnxruntime": ("fp32", "int8"),
}
"""The number formats that each backend computes in."""
Size = tuple[int, int] | int

PAPER_SIZE = (800, 1344)
"""What Mask R-CNN's figures are given for: the shorter side 800, the longer up to 1333."""
_LARGEST_SIDE = 4096
_TOOLS = ("maskcast", "torch", "torchvision", "onnx")


def build(
    source: str | Path,
    out: str | Path,
    *,
    backend: Backend = "openvino",
    precision: str = "fp32",
    size: Size | None = None,
    name: str | None = None,
    fp16_weights: bool = False,
    score_threshold: float | None = None,
    calibration: Path | None = None,
) -> Bundle:
    """Turn a checkpoint into a bundle, or a bundle into one of another precision or size.

    The bundle's folder appears when it is complete, in place of an older bundle of that name.

    Args:
        source: a file or a name, as ``load_checkpoint`` takes it; a bundle's
            folder; or "default". torch is not needed for a bundle.
        out: the bundle's folder.
        backend: what it is for.
        precision: what it computes in, see ``PRECISIONS``.
        size: height and width of the network's input, or the longest side of pictures whose aspect
            ratio it shall follow; multiples of 32. By default a bundle's own, else ``PAPER_SIZE``.
        name: of the model; the folder's by default.
        fp16_weights: store weights in half the space; they are computed with as ``precision`` says.
        score_threshold: that a user gets who names none; by default a bundle's own, else 0.5.
        calibration: folder of pictures like those that the model will see, for int8: a few dozen.
            A bundle that is quantised already may keep its ranges.

    Raises:
        InputError: source, size, precision, pictures or folder will not do.
    """
    out = Path(out)
    _check_precision(backend, precision, calibration)
    if size is not None:
        _check_size(size)
    check_bundle_folder(out)
    manifest, graphs = _read_bundle(source) if is_bundle(source) else _export(source)
    shape = manifest.input
    if size is not None:
        pad = shape.pad_value
        shape = LongestSideInput(size, pad) if isinstance(size, int) else FixedInput(*size, pad)
    if calibration is not None:
        quantise_graphs(graphs, read_calibration_images(calibration, shape))
    elif precision == "int8" and not is_quantised(graphs["detector"]):
        raise InputError(
            "precision int8 finds its ranges with pictures: give a folder of a few dozen with "
            "--calibration"
        )
    if precision != "int8":
        for graph in graphs.values():
            restore_float(graph)
            if fp16_weights:
                halve_weights(graph)
    with new_bundle(out) as folder:
        files = {}
        for role, graph in graphs.items():
            onnx.checker.check_model(graph)
            path = folder / f"{role}.onnx"
            onnx.save(graph, path)
            files[role] = GraphFile(path.name, sha256(path))
        manifest = replace(
            manifest,
            name=name or out.name,
            backend=backend,
            precision=precision,
            input=shape,
            score_threshold=(
                manifest.score_threshold if score_threshold is None else score_threshold
            ),
            graphs=Graphs(**files),
            plans=(),
        )
        write_manifest(folder, manifest)
    return open_bundle(out)


def _read_bundle(source: str | Path) -> tuple[Manifest, dict[str, ModelProto]]:
    bundle = open_bundle(source)
    graphs = {"detector": onnx.load(bundle.detector)}
    if bundle.segmenter is not None:
        graphs["segmenter"] = onnx.load(bundle.segmenter)
    return bundle.manifest, graphs


def _export(checkpoint: str | Path) -> tuple[Manifest, dict[str, ModelProto]]:
    from maskcast.builder.checkpoint.checkpoint import load_network
    from maskcast.builder.graph.export import export_detector, export_segmenter

    config, network = load_network(checkpoint)
    graphs = {"detector": export_detector(network)}
    if config.with_masks:
        graphs["segmenter"] = export_segmenter(network)
    manifest = Manifest(
        name="",
        backend="openvino",
        precision="fp32",
        labels=("background", *config.labels),
        input=FixedInput(*PAPER_SIZE, round(sum(config.image_mean) / 3 * 255)),
        score_threshold=0.5,
        graphs=Graphs(detector=GraphFile("", "")),
        built_with=_versions(),
    )
    return manifest, graphs


def _check_precision(backend: Backend, precision: str, calibration: Path | None) -> None:
    if precision not in PRECISIONS[backend]:
        raise InputError(
            f"precision {precision}: {backend} computes in {' or '.join(PRECISIONS[backend])}"
        )
    if precision != "int8" and calibration is not None:
        raise InputError(f"precision {precision} needs no --calibration: leave it out")
    if precision == "bf16":
        from maskcast.engines.openvino.engine import has_bf16

        if not has_bf16():
            raise InputError("precision bf16: this CPU does not compute in it; choose fp32")


def _check_size(size: Size) -> None:
    for side in (size,) if isinstance(size, int) else size:
        if not 64 <= side <= _LARGEST_SIDE or side % 32:
            raise InputError(f"size {side}: give multiples of 32 from 64 to {_LARGEST_SIDE} pixels")


def _versions() -> dict[str, str]:
    versions = {}
    for package in _TOOLS:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:  # maskcast itself, run from a checkout
            versions[package] = "unknown"
    return versions
