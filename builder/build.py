"""Build a bundle from a checkpoint or from another bundle, for every backend.

The source is read into a manifest and graphs in memory. The precision is written into the graphs,
which are then saved. For TensorRT, they are also compiled, into the same folder.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

import onnx
from msgspec.structs import replace
from onnx import ModelProto

from maskcast.builder.bundle_writer import check_bundle_folder, new_bundle, write_manifest
from maskcast.builder.graph.float16 import store_float16
from maskcast.builder.graph.quantization import is_quantised, quantise_graphs, restore_float
from maskcast.builder.images import read_calibration_images
from maskcast.engines.bundle import (
    Backend,
    Bundle,
    FixedInput,
    GraphFile,
    Graphs,
    Input,
    LongestSideInput,
    Manifest,
    is_bundle,
    open_bundle,
    sha256,
)
from maskcast.engines.errors import InputError
from maskcast.engines.image import NetworkImage

if TYPE_CHECKING:
    from maskcast.builder.tensorrt.process import Built

Size = tuple[int, int] | int
Report = Callable[[str, int, int], None]
"""Called with the name of a step, the parts done and the total number of parts (0 if unknown)."""

PRECISIONS: dict[Backend, tuple[str, ...]] = {
    "openvino": ("fp32", "bf16", "int8"),
    "onnxruntime": ("fp32", "int8"),
    "tensorrt": ("fp32", "fp16", "int8"),
    "tensorrt_rtx": ("fp32", "fp16", "int8"),
}
"""The number formats that each backend computes in."""

PAPER_SIZE = (800, 1344)
"""The size of Mask R-CNN's published figures: shorter side 800, longer side up to 1333 pixels."""
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
    labels: Sequence[str] | None = None,
    fp16_weights: bool = False,
    score_threshold: float | None = None,
    calibration: Path | Sequence[NetworkImage] | None = None,
    max_batch: int | None = None,
    capabilities: Sequence[str] = (),
    report: Report = lambda step, done, total: None,
    on_plan: Callable[[str, Built], None] = lambda graph, built: None,
) -> Bundle:
    """Build a bundle from a checkpoint or from another bundle.

    The folder is written only when the bundle is complete, and replaces an older bundle. Options
    that the backend or the precision does not support are errors.

    Args:
        source: checkpoint file or name, as for ``load_checkpoint``; folder of a bundle; or
            "default". Building from a bundle does not need torch.
        out: folder of the new bundle; may be that of the source.
        backend: engine that runs the bundle.
        precision: number format that it computes in, see ``PRECISIONS``.
        size: height and width of the network's input; or the longest side, for an input that
            follows the aspect ratio of the images (not with TensorRT). Multiples of 32 from 64 to
            4096. By default a bundle's own, else ``PAPER_SIZE``.
        name: of the model; by default that of the folder.
        labels: names of the classes 1, 2, ...; by default those of the source.
        fp16_weights: store weights as float16, which halves the file; they are converted to
            ``precision`` for computing.
        score_threshold: default minimum score, 0..1; by default a bundle's own, else 0.5.
        calibration: for int8: a folder of a few dozen images like those that the model will see, or
            such images already resized to the network's input. Without it, a quantised bundle keeps
            its ranges.
        max_batch: TensorRT: maximum number of images per batch; 1 by default.
        capabilities: TensorRT-RTX: compute capabilities to build for, for example "8.6"; by default
            that of the local GPU, else ``USUAL_CAPABILITIES``.
        report: receives the progress.
        on_plan: called with the name of each graph that TensorRT compiled, and the result.

    Raises:
        InputError: source, folder, images or an option cannot be used.
    """
    out = Path(out)
    is_tensorrt = backend in ("tensorrt", "tensorrt_rtx")
    _check_precision(backend, precision, fp16_weights, calibration is not None)
    if not is_tensorrt and (max_batch is not None or capabilities):
        option = "--batch" if max_batch is not None else "--compute-capability"
        raise InputError(f"{option}: {backend} does not use it; leave it out or choose TensorRT")
    if size is not None:
        _check_size(size)
    if score_threshold is not None and not 0 <= score_threshold <= 1:
        raise InputError(f"score threshold {score_threshold}: give a number from 0 to 1")
    check_bundle_folder(out)

    report(f"reading {source}", 0, 0)
    manifest, graphs = _read_bundle(source) if is_bundle(source) else _export(source, report)
    shape = manifest.input
    if size is not None:
        pad = shape.pad_value
        shape = LongestSideInput(size, pad) if isinstance(size, int) else FixedInput(*size, pad)
    if is_tensorrt:
        _check_fixed(shape, backend)
    manifest = replace(
        manifest,
        name=name or out.resolve().name,
        backend=backend,
        precision=precision,
        labels=manifest.labels if labels is None else _relabel(manifest.labels, labels),
        input=shape,
        score_threshold=manifest.score_threshold if score_threshold is None else score_threshold,
        plans=(),
    )
    _convert(graphs, precision, fp16_weights, _images(calibration, shape), report)
    with new_bundle(out) as folder:
        report("writing the graphs", 0, 0)
        manifest = replace(manifest, graphs=_save(graphs, folder))
        if is_tensorrt:
            from maskcast.builder.tensorrt.plans import build_plans

            report(f"compiling with {backend}", 0, 0)
            manifest = build_plans(
                folder,
                manifest,
                max_batch=max_batch or 1,
                capabilities=capabilities,
                report=report,
                on_plan=on_plan,
            )
        write_manifest(folder, manifest)
    return open_bundle(out)


def _read_bundle(source: str | Path) -> tuple[Manifest, dict[str, ModelProto]]:
    bundle = open_bundle(source)
    present = bundle.manifest.graphs.present
    graphs: dict[str, ModelProto] = {
        name: onnx.load(bundle.path / graph.file) for name, graph in present.items()
    }
    return bundle.manifest, graphs


def _export(checkpoint: str | Path, report: Report) -> tuple[Manifest, dict[str, ModelProto]]:
    from maskcast.builder.checkpoint.checkpoint import load_network
    from maskcast.builder.graph.export import export_detector, export_poser, export_segmenter

    config, network = load_network(checkpoint)
    report("exporting the detector", 0, 0)
    graphs = {"detector": export_detector(network)}
    if config.with_masks:
        report("exporting the segmenter", 0, 0)
        graphs["segmenter"] = export_segmenter(network)
    if config.keypoints is not None:
        report("exporting the poser", 0, 0)
        graphs["poser"] = export_poser(network)
    manifest = Manifest(
        name="",
        backend="openvino",
        precision="fp32",
        labels=("background", *config.labels),
        input=FixedInput(*PAPER_SIZE, round(sum(config.image_mean) / 3 * 255)),
        score_threshold=0.5,
        graphs=Graphs(**dict.fromkeys(graphs, GraphFile("", ""))),
        keypoints=config.keypoints,
        keypoint_blur_cells=config.keypoint_blur_cells,
        built_with=_versions(),
    )
    return manifest, graphs


def _images(
    calibration: Path | Sequence[NetworkImage] | None, shape: Input
) -> Sequence[NetworkImage]:
    if isinstance(calibration, Path):
        return read_calibration_images(calibration, shape)
    return calibration or ()


def _convert(
    graphs: dict[str, ModelProto],
    precision: str,
    fp16_weights: bool,
    images: Sequence[NetworkImage],
    report: Report,
) -> None:
    """Write a precision into portable graphs, in place; bf16 and fp16 are float32 there."""
    if precision != "int8":
        for graph in graphs.values():
            restore_float(graph)
            if fp16_weights:
                store_float16(graph)
    elif images:
        report(f"finding int8 ranges on {len(images)} images", 0, 0)
        quantise_graphs(graphs, images)
    elif not is_quantised(graphs["detector"]):
        raise InputError(
            "precision int8: needs images to find the ranges; give a folder of a few dozen with "
            "--calibration"
        )


def _save(graphs: dict[str, ModelProto], folder: Path) -> Graphs:
    files = {}
    for role, graph in graphs.items():
        onnx.checker.check_model(graph)
        path = folder / f"{role}.onnx"
        onnx.save(graph, path)
        files[role] = GraphFile(path.name, sha256(path))
    return Graphs(**files)


def _relabel(old: Sequence[str], labels: Sequence[str]) -> tuple[str, ...]:
    if len(labels) != len(old) - 1:
        raise InputError(
            f"labels: got {len(labels)}, expected {len(old) - 1}; name each class of the model, "
            "without the background"
        )
    if not all(labels) or len(set(labels)) != len(labels):
        raise InputError("labels: a name is empty or occurs twice; name each class once")
    return (old[0], *labels)


def _check_precision(
    backend: Backend, precision: str, fp16_weights: bool, has_calibration: bool
) -> None:
    if precision not in PRECISIONS[backend]:
        *most, last = PRECISIONS[backend]
        raise InputError(
            f"precision {precision}: not supported by {backend}; choose {', '.join(most)} or {last}"
        )
    if precision != "int8" and has_calibration:
        raise InputError(
            f"--calibration: precision {precision} does not use it; leave it out or choose int8"
        )
    if precision == "int8" and fp16_weights:
        raise InputError("--fp16-weights: int8 weights are already smaller; leave it out")
    if precision == "bf16":
        from maskcast.engines.openvino.engine import has_bf16

        if not has_bf16():
            raise InputError("precision bf16: not supported by this CPU; choose fp32")


def _check_size(size: Size) -> None:
    for side in (size,) if isinstance(size, int) else size:
        if not 64 <= side <= _LARGEST_SIDE or side % 32:
            raise InputError(f"size {side}: give multiples of 32 from 64 to {_LARGEST_SIDE} pixels")


def _check_fixed(shape: Input, backend: Backend) -> None:
    if isinstance(shape, LongestSideInput):
        (height, width), _ = shape.shape(1080, 1920)
        raise InputError(
            f"size {shape.longest_side}: {backend} needs a fixed input size; "
            f"give --size HEIGHTxWIDTH, for 16:9 {height}x{width}"
        )


def _versions() -> dict[str, str]:
    versions = {}
    for package in _TOOLS:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:  # maskcast itself, run from a checkout
            versions[package] = "unknown"
    return versions
