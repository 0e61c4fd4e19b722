"""From a checkpoint to a bundle."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import onnx
from torch import Tensor

from builder.bundle_folder import check_bundle_folder, new_bundle, write_manifest
from builder.checkpoint import load_network
from builder.export import export_detector, export_segmenter, halve_weights, state_dict_of_graph
from engines.bundle import (
    Backend,
    Bundle,
    FixedInput,
    GraphFile,
    Graphs,
    Input,
    LongestSideInput,
    Manifest,
    open_bundle,
    sha256,
)
from engines.errors import InputError

PRECISIONS: dict[Backend, tuple[str, ...]] = {
    "openvino": ("fp32", "bf16"),
    "onnxruntime": ("fp32",),
    "tensorrt": ("fp32", "fp16", "int8"),
    "tensorrt_rtx": ("fp32", "fp16", "int8"),
}
"""The number formats that each backend computes in."""

_LARGEST_SIDE = 4096
_TOOLS = ("maskcast", "torch", "torchvision", "onnx")


def build(
    checkpoint: str | Path,
    out: str | Path,
    *,
    backend: Backend = "openvino",
    precision: str = "fp32",
    size: tuple[int, int] | int = (800, 1344),
    name: str | None = None,
    fp16_weights: bool = False,
    score_threshold: float = 0.5,
    **plan_options: Any,
) -> Bundle:
    """Turn a checkpoint into a bundle.

    The bundle's folder appears when it is complete, in place of an older bundle of that name.

    Args:
        checkpoint: a file or a name, as ``builder.checkpoint.load_checkpoint`` takes it.
        out: the bundle's folder.
        backend: what it is for.
        precision: what it computes in, see ``PRECISIONS``.
        size: height and width of the network's input, or the longest side of pictures whose aspect
            ratio it shall follow; multiples of 32.
        name: of the model; the folder's by default.
        fp16_weights: store weights in half the space; they are computed with as ``precision`` says.
        score_threshold: that a user gets who names none.
        plan_options: of ``builder.tensorrt.build_plans``, for the TensorRT backends.

    Raises:
        InputError: checkpoint, size, precision or folder will not do.
    """
    out = Path(out)
    _check_precision(backend, precision)
    _check_size(size)
    check_bundle_folder(out)
    config, network = load_network(checkpoint)
    pad_value = round(sum(config.image_mean) / 3 * 255)
    shape: Input = (
        LongestSideInput(size, pad_value) if isinstance(size, int) else FixedInput(*size, pad_value)
    )
    graphs = {"detector": export_detector(network)}
    if config.with_masks:
        graphs["segmenter"] = export_segmenter(network)
    with new_bundle(out) as folder:
        files = {}
        for role, graph in graphs.items():
            if fp16_weights:
                halve_weights(graph)
            path = folder / f"{role}.onnx"
            onnx.save(graph, path)
            files[role] = GraphFile(path.name, sha256(path))
        manifest = Manifest(
            name=name or out.name,
            backend=backend,
            precision=precision,
            labels=("background", *config.labels),
            input=shape,
            score_threshold=score_threshold,
            graphs=Graphs(**files),
            built_with=_versions(),
        )
        if backend.startswith("tensorrt"):
            from builder.tensorrt import build_plans

            manifest = build_plans(folder, manifest, **plan_options)
        write_manifest(folder, manifest)
    return open_bundle(out)


def state_dict_of_bundle(path: str | Path) -> dict[str, Tensor]:
    """Read a bundle's weights back, under the keys of the ``state_dict`` of the model it was.

    Returns:
        float32 tensors. Counters of training (``num_batches_tracked``) are not in a bundle.

    Raises:
        InputError: it is no bundle, or a damaged one.
    """
    bundle = open_bundle(path)
    state = state_dict_of_graph(onnx.load(bundle.detector))
    if bundle.segmenter is not None:
        state |= state_dict_of_graph(onnx.load(bundle.segmenter))
    return state


def _check_precision(backend: Backend, precision: str) -> None:
    if precision not in PRECISIONS[backend]:
        raise InputError(
            f"precision {precision}: {backend} computes in {' or '.join(PRECISIONS[backend])}"
        )
    if precision == "bf16":
        from engines.openvino import has_bf16

        if not has_bf16():
            raise InputError("precision bf16: this CPU does not compute in it; choose fp32")


def _check_size(size: tuple[int, int] | int) -> None:
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
