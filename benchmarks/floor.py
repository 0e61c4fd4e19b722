"""Measure the engine's time by part of the network, compared with the arithmetic alone.

Run: ``python -m benchmarks.floor [--bundle FOLDER] [--size HxW] [--boxes N] [--repeat N]
[--json]``.

The floor of a part is its multiplications and additions divided by the rate that this machine
reaches on large int8 convolutions, measured in the same run. Parts without either (pooling,
proposals, suppression) have no floor: all of their time is overhead. Times are medians, by
OpenVINO's own clock, of all threads together in latency mode.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import defaultdict
from typing import Any

import numpy as np
import openvino as ov
import openvino.opset15 as op
from rich.console import Console
from rich.table import Table

from maskcast.engines.bundle import open_bundle
from maskcast.engines.openvino.compiled import FEATURES, fix_box_graph, fix_detector, levels
from maskcast.engines.openvino.operators import read_graph

PARTS = {
    "backbone.body": "backbone",
    "backbone.fpn": "feature pyramid",
    "rpn.": "RPN head",
    "roi_heads.box": "box head",
    "roi_heads.mask": "mask head",
}
_CHANNELS, _SIDE, _LAYERS = 256, 128, 4


def int8_rate(repeat: int = 30) -> float:
    """Measure this machine: operations a second of 3x3 convolutions, 256 to 256 channels, int8."""
    rng = np.random.default_rng(0)
    low, high = np.float32(-4), np.float32(4)

    def quantised(values: Any) -> Any:
        return op.fake_quantize(values, low, high, low, high, 255)

    images = op.parameter([1, _CHANNELS, _SIDE, _SIDE], np.float32)
    x: Any = quantised(images)
    for _ in range(_LAYERS):
        weight = rng.normal(0, 0.02, (_CHANNELS, _CHANNELS, 3, 3)).astype(np.float32)
        around = [1, 1]
        x = op.convolution(x, quantised(op.constant(weight)), [1, 1], around, around, around)
        x = quantised(op.relu(x))
    model = ov.Model([op.result(x)], [images], "convolutions")
    request = ov.compile_model(model, "CPU", {"PERFORMANCE_HINT": "LATENCY"}).create_infer_request()
    inputs = rng.normal(0, 1, (1, _CHANNELS, _SIDE, _SIDE)).astype(np.float32)
    best_s = float("inf")
    for _ in range(repeat):
        began_s = time.perf_counter()
        request.infer([inputs])
        best_s = min(best_s, time.perf_counter() - began_s)
    return 2 * _LAYERS * _CHANNELS**2 * 9 * _SIDE**2 / best_s


def count_operations(model: ov.Model, boxes: int) -> dict[str, tuple[str, float]]:
    """Return the part of the network and the operations of each layer with weights.

    ``boxes`` is used where the number of boxes is dynamic.
    """
    counted = {}
    for node in model.get_ordered_ops():
        if node.get_type_name() not in (
            "Convolution",
            "GroupConvolution",
            "MatMul",
            "ConvolutionBackpropData",
        ):
            continue
        weight = node.input_value(1).get_node()
        while weight.get_input_size():
            weight = weight.input_value(0).get_node()
        part = part_of(weight.get_friendly_name())
        if part is None:
            continue
        weights, inputs, outputs = (
            [boxes if side.is_dynamic else side.get_length() for side in shape]
            for shape in (
                node.get_input_partial_shape(1),
                node.get_input_partial_shape(0),
                node.get_output_partial_shape(0),
            )
        )
        kind = node.get_type_name()
        if kind == "MatMul":
            operations = 2 * float(np.prod(outputs)) * weights[1]
        elif kind == "ConvolutionBackpropData":
            operations = 2 * float(np.prod(inputs)) * float(np.prod(weights[1:]))
        else:  # grouped kernels have one dimension more in front
            operations = 2 * float(np.prod(outputs)) * float(np.prod(weights[-3:]))
        counted[node.get_friendly_name()] = (part, operations)
    return counted


def part_of(name: str) -> str | None:
    """Return the part of the network that a parameter belongs to."""
    return next((part for prefix, part in PARTS.items() if name.startswith(prefix)), None)


def time_parts(
    model: ov.Model, inputs: dict[str, Any], boxes: int, repeat: int
) -> dict[str, dict[str, float]]:
    """Run a graph and add up the layers of each part: milliseconds and operations."""
    counted = count_operations(model, boxes)
    compiled = ov.compile_model(
        model, "CPU", {"PERFORMANCE_HINT": "LATENCY", "PERF_COUNT": True,
                       "INFERENCE_PRECISION_HINT": "f32"},
    )  # fmt: skip
    request = compiled.create_infer_request()
    rounds: list[dict[str, float]] = []
    for _ in range(repeat + 2):
        request.infer(inputs)
        spent: defaultdict[str, float] = defaultdict(float)
        for layer in request.profiling_info:
            name = layer.node_name.partition("/")[0]
            part = next((p for key in (layer.node_name, name) if (p := _part(key, counted))), None)
            part = part or _by_kind(layer.node_type)
            spent[part] += layer.real_time.total_seconds() * 1000
        rounds.append(spent)
    names = {name for spent in rounds for name in spent}
    operations: defaultdict[str, float] = defaultdict(float)
    for part, number in counted.values():
        operations[part] += number
    return {
        name: {
            "ms": statistics.median(spent[name] for spent in rounds[2:]),
            "operations": operations[name],
        }
        for name in names
    }


def _part(name: str, counted: dict[str, tuple[str, float]]) -> str | None:
    for known, (part, _) in counted.items():
        if known == name or known.partition("/")[0] == name:
            return part
    return part_of(name)


def _by_kind(kind: str) -> str:
    if kind in ("EmbeddingBagPackedSum", "ROIAlign"):
        return "RoIAlign"
    if kind in ("TopK", "NonMaxSuppression"):
        return "top-k and NMS"
    return "everything between"


def detector_inputs(size: tuple[int, int]) -> dict[str, Any]:
    """Make an image of noise: the work does not depend on the content."""
    pixels = np.random.default_rng(0).integers(0, 256, (1, *size, 3), np.uint8)
    return {"images": pixels, "sizes": np.array([size], np.float32)}


def segmenter_inputs(
    size: tuple[int, int], boxes: int, channels: int, labels: int
) -> dict[str, Any]:
    """Make features and boxes of noise."""
    rng = np.random.default_rng(0)
    corners = rng.uniform(0, 0.5, (boxes, 2)) * [size[1], size[0]]
    sides = rng.uniform(0.1, 0.5, (boxes, 2)) * [size[1], size[0]]
    cells = sum(rows * columns for rows, columns in levels(size).values())
    return {
        FEATURES: rng.normal(0, 1, (cells, channels)).astype("f4"),
        "boxes": np.concatenate([corners, corners + sides], 1).astype("f4"),
        "labels": rng.integers(1, labels, boxes).astype("i8"),
        "batch_index": np.zeros(boxes, "i4"),
    }


def measure(
    bundle_path: str, size: tuple[int, int], boxes: int, repeat: int
) -> dict[str, dict[str, float]]:
    """Measure the int8 rate of the machine, then a bundle's parts."""
    bundle = open_bundle(bundle_path)
    rate = int8_rate()
    detector = fix_detector(read_graph(bundle.detector), size)
    channels = detector.output(FEATURES).get_partial_shape()[1].get_length()
    parts = time_parts(detector, detector_inputs(size), boxes, repeat)
    if bundle.segmenter is not None:
        segmenter = fix_box_graph(read_graph(bundle.segmenter), size, boxes)
        labels = len(bundle.manifest.labels)
        inputs = segmenter_inputs(size, boxes, channels, labels)
        for name, found in time_parts(segmenter, inputs, boxes, repeat).items():
            name = name if name == "mask head" else f"{name}, masks"
            parts[name] = found
    for found in parts.values():
        found["floor_ms"] = found["operations"] / rate * 1000
    total = {key: sum(found[key] for found in parts.values()) for key in ("ms", "operations")}
    parts = dict(sorted(parts.items(), key=lambda item: -item[1]["ms"]))
    return parts | {"all": total | {"floor_ms": total["operations"] / rate * 1000, "rate": rate}}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--bundle", default="default")
    parser.add_argument("--size", default="256x448")
    parser.add_argument("--boxes", type=int, default=10, help="number of boxes with masks")
    parser.add_argument("--repeat", type=int, default=20)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args()
    height, width = map(int, arguments.size.split("x"))
    found = measure(arguments.bundle, (height, width), arguments.boxes, arguments.repeat)
    if arguments.json:
        print(json.dumps(found))
        return
    rate = found["all"]["rate"]
    table = Table("part", "ms", "GOP", "floor ms", title=f"int8: {rate / 1e12:.2f} TOP/s")
    for name, part in found.items():
        floor = f"{part['floor_ms']:.2f}" if part["operations"] else ""
        table.add_row(name, f"{part['ms']:.2f}", f"{part['operations'] / 1e9:.2f}", floor)
    Console().print(table)


if __name__ == "__main__":
    main()
