"""Write a bundle's TensorRT plans as a model repository of the Triton inference server.

Three models: the detector, the segmenter, and an ensemble that runs one after the other on one
image. Triton loads the plugin library with ``--backend-config=tensorrt,plugins=PATH``. It runs
plans of ``tensorrt`` that were built with its own version.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import onnx
from onnx import TensorProto

from maskcast.builder.graph.size import FEATURES
from maskcast.builder.tensorrt.plans import prepare_graph
from maskcast.engines.bundle import Bundle
from maskcast.engines.errors import InputError

_TYPES = {
    TensorProto.FLOAT: "TYPE_FP32",
    TensorProto.FLOAT16: "TYPE_FP16",
    TensorProto.INT32: "TYPE_INT32",
    TensorProto.INT64: "TYPE_INT64",
}
_FROM_DETECTOR = ("boxes", "labels")


class Tensor(NamedTuple):
    """An input or output of a model: name, Triton's type, dimensions (-1: dynamic)."""

    name: str
    type: str
    dims: tuple[int, ...]


def check_triton(backend: str) -> None:
    """Check that Triton can serve the plans of a backend.

    Raises:
        InputError: the backend is not ``tensorrt``.
    """
    if backend != "tensorrt":
        raise InputError(
            f"--triton: Triton runs plans of tensorrt, not of {backend}; choose --backend tensorrt"
        )


def write_repository(bundle: Bundle, folder: Path) -> None:
    """Write the model repository of a bundle with plans; models of that name are replaced.

    Args:
        bundle: with a plan of each of its graphs.
        folder: the model repository; it may hold other models.

    Raises:
        InputError: the folder cannot be written.
    """
    name = re.sub(r"[^\w.-]", "_", bundle.manifest.name)
    paths = {"detector": bundle.detector, "segmenter": bundle.segmenter}
    described: dict[str, tuple[list[Tensor], list[Tensor]]] = {}
    try:
        for plan in bundle.manifest.plans:
            if (path := paths.get(plan.graph)) is None:  # the poser: heatmaps are not served
                continue
            size = plan.height, plan.width
            graph = prepare_graph(onnx.load(path), plan.precision, size, path).graph
            inputs, outputs = _tensors(graph.input), _tensors(graph.output)
            described[plan.graph] = inputs, outputs
            model = folder / f"{name}_{plan.graph}"
            (model / "1").mkdir(parents=True, exist_ok=True)
            shutil.copyfile(bundle.path / plan.file, model / "1" / "model.plan")
            detections = _detections(described["detector"][1])
            text = _model(model.name, inputs, outputs, detections)
            (model / "config.pbtxt").write_text(text)
        if "segmenter" in described:
            (folder / name / "1").mkdir(parents=True, exist_ok=True)
            (folder / name / "config.pbtxt").write_text(_ensemble(name, described))
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error.strerror})") from None


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    found = []
    for value in values:
        kind = value.type.tensor_type
        dims = tuple(d.dim_value if d.HasField("dim_value") else -1 for d in kind.shape.dim)
        found.append(Tensor(value.name, _TYPES[kind.elem_type], dims))
    return found


def _detections(outputs: list[Tensor]) -> int:
    """Return the number of boxes that the detector returns per image."""
    return next(tensor.dims[1] for tensor in outputs if tensor.name == "boxes")


def _model(name: str, inputs: list[Tensor], outputs: list[Tensor], detections: int) -> str:
    # 0: the plans have a batch dimension of their own; the segmenter's counts boxes.
    lines = [f'name: "{name}"', 'platform: "tensorrt_plan"', "max_batch_size: 0"]
    for tensor in inputs:
        reshape = ""
        dims = tensor.dims
        if name.endswith("_segmenter") and tensor.name in _FROM_DETECTOR:
            # The detector returns [images, detections, ...], here for one image.
            inner = (detections, *dims[1:])
            reshape, dims = f" reshape {{ shape: {list(inner)} }}", (1, *inner)
        lines.append(_entry("input", tensor.name, tensor.type, dims, reshape))
    lines += [_entry("output", *tensor, "") for tensor in outputs]
    return "\n".join(lines) + "\n"


def _entry(kind: str, name: str, type_: str, dims: tuple[int, ...], more: str) -> str:
    return f'{kind} {{ name: "{name}" data_type: {type_} dims: {list(dims)}{more} }}'


def _ensemble(name: str, described: dict[str, tuple[list[Tensor], list[Tensor]]]) -> str:
    detector_inputs, detector_outputs = described["detector"]
    segmenter_inputs, segmenter_outputs = described["segmenter"]
    detections = _detections(detector_outputs)
    index = next(tensor for tensor in segmenter_inputs if tensor.name == "batch_index")
    inputs = [tensor._replace(dims=(1, *tensor.dims[1:])) for tensor in detector_inputs]
    inputs.append(index._replace(dims=(detections,)))
    outputs = [
        t._replace(dims=(1, *t.dims[1:])) for t in detector_outputs if t.name not in FEATURES
    ]
    outputs += [t._replace(dims=(detections, *t.dims[1:])) for t in segmenter_outputs]
    lines = [
        "# Runs on one image. batch_index: a zero for each detection.",
        f'name: "{name}"',
        'platform: "ensemble"',
        "max_batch_size: 0",
        *(_entry("input", *tensor, "") for tensor in inputs),
        *(_entry("output", *tensor, "") for tensor in outputs),
        "ensemble_scheduling {",
        *_step(f"{name}_detector", detector_inputs, detector_outputs),
        *_step(f"{name}_segmenter", segmenter_inputs, segmenter_outputs),
        "}",
    ]
    return "\n".join(lines) + "\n"


def _step(model: str, inputs: list[Tensor], outputs: list[Tensor]) -> list[str]:
    lines = ["  step {", f'    model_name: "{model}"', "    model_version: -1"]
    lines += [f'    input_map {{ key: "{t.name}" value: "{t.name}" }}' for t in inputs]
    lines += [f'    output_map {{ key: "{t.name}" value: "{t.name}" }}' for t in outputs]
    return [*lines, "  }"]
