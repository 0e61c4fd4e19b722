"""Post-training int8: ranges found on the user's images, written into the graph as Q/DQ nodes.

Weights are symmetric with one scale per output channel, activations symmetric with one scale per
tensor: TensorRT and OpenVINO both accept that, so one graph serves every backend. The last layer of
each head stays float32: its error would directly affect boxes, scores and masks.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from maskcast.builder.graph.float16 import CARRIES
from maskcast.builder.graph.folding import fold_layers
from maskcast.builder.graph.nodes import drop_unused_initializers, replace_nodes
from maskcast.builder.graph.size import FEATURES
from maskcast.engines.errors import InputError
from maskcast.engines.image import NetworkImage

Sample = Mapping[str, NDArray[Any]]

PERCENTILE = 99.99
"""Percentile of an activation's absolute values that is its range; larger ones are clipped."""
_QUANTISED = {"Conv": 0, "ConvTranspose": 1, "Gemm": 0}
"""Operators computed in int8, and the axis of the output channels in their weights."""
_LEVELS = 127
_SHARES = {"Add", "MaxPool", "Resize"}
"""Operators that read a quantised value through its Q/DQ too, so that a runtime keeps one copy."""


def quantise(model: ModelProto, samples: Iterable[Sample]) -> None:
    """Write Q/DQ nodes around convolutions and products, in place.

    Args:
        model: float32, after ``maskcast.builder.graph.folding.fold_layers``.
        samples: inputs of the graph; their activations define the ranges.

    Raises:
        InputError: there is no sample.
    """
    targets = _targets(model)
    values = {node.input[0] for node in targets} | _shortcuts(model, targets)
    ranges = _ranges(model, values, samples)
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    chosen = {node.output[0] for node in targets}
    nodes: list[NodeProto] = []
    made: set[str] = set()

    def insert_qdq(names: Iterable[str]) -> None:
        for name in filter(values.__contains__, names):
            nodes.extend(_around_activation(model, name, ranges[name]))

    insert_qdq(graph_input.name for graph_input in model.graph.input)
    for node in model.graph.node:
        if node.output[0] in chosen:
            data, weight = node.input[0], node.input[1]
            if weight not in made:
                nodes.append(_around_weight(model, weights[weight], _QUANTISED[node.op_type]))
            made.add(weight)
            node.input[0], node.input[1] = f"{data}/int8/float32", f"{weight}/float32"
        nodes.append(node)
        insert_qdq(node.output)
    for node in nodes:
        if node.op_type in _SHARES:
            for place, name in enumerate(node.input):
                if name in ranges:
                    node.input[place] = f"{name}/int8/float32"
    replace_nodes(model, nodes)
    drop_unused_initializers(model)
    del model.graph.value_info[:]


def is_quantised(model: ModelProto) -> bool:
    """Return whether a graph has Q/DQ nodes."""
    return any(node.op_type == "QuantizeLinear" for node in model.graph.node)


def dequantise(model: ModelProto) -> None:
    """Undo ``quantise``, in place, except the rounding of the weights."""
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    source: dict[str, str] = {}
    nodes = []
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear":
            source[node.output[0]] = node.input[0]
        elif node.op_type != "DequantizeLinear":
            nodes.append(node)
        elif node.input[0] in source:
            source[node.output[0]] = source[node.input[0]]
        else:
            values, scales = stored[node.input[0]], stored[node.input[1]]
            (axis,) = (attribute.i for attribute in node.attribute if attribute.name == "axis")
            scales = scales.reshape([-1 if other == axis else 1 for other in range(values.ndim)])
            name = node.input[0].removesuffix("/int8")
            model.graph.initializer.append(numpy_helper.from_array(values * scales, name))
            source[node.output[0]] = name
    for node in nodes:
        for place, name in enumerate(node.input):
            node.input[place] = source.get(name, name)
    replace_nodes(model, nodes)
    drop_unused_initializers(model)


def quantise_graphs(graphs: Mapping[str, ModelProto], images: Iterable[NetworkImage]) -> None:
    """Quantise a model's graphs, in place.

    Args:
        graphs: ``detector`` and, if present, ``segmenter`` and ``poser``, float32 as exported.
            Quantised ones get new ranges.
        images: like those that the model will see, 32 or more, of any size.

    Raises:
        InputError: there is no image.
    """
    for model in graphs.values():
        restore_float(model)
        fold_layers(model)
    samples: list[Sample] = [
        {
            "images": image.pixels.transpose(2, 0, 1)[None].astype(np.float32),
            "sizes": np.array([image.content], np.float32),
        }
        for image in images
    ]
    detector = graphs["detector"]
    for role in ("segmenter", "poser"):
        if role in graphs:
            taken = {value.name for value in graphs[role].graph.input}
            found = _detections(detector, samples)
            quantise(graphs[role], ({k: s[k] for k in taken} for s in found))
    quantise(detector, samples)


def restore_float(model: ModelProto) -> None:
    """Turn a graph that may be quantised into a float32 one."""
    if is_quantised(model):
        dequantise(model)


def _detections(detector: ModelProto, samples: Iterable[Sample]) -> Iterable[Sample]:
    """Yield up to 30 detections of each sample, of any score; if none, a box of the whole image."""
    session = _session(detector)
    names = [output.name for output in detector.graph.output]
    for sample in samples:
        found = dict(zip(names, session.run(names, dict(sample)), strict=True))
        count = min(int(found["counts"][0]), 30)
        height, width = sample["sizes"][0]
        everything = np.array([[0, 0, width, height]], np.float32)
        yield {
            **{name: found[name] for name in FEATURES},
            "boxes": found["boxes"][0, :count] if count else everything,
            "labels": found["labels"][0, :count] if count else np.ones(1, np.int64),
            "batch_index": np.zeros(max(count, 1), np.int32),
        }


def _targets(model: ModelProto) -> list[NodeProto]:
    """Return the convolutions and products with constant weights whose output enters another."""
    readers: defaultdict[str, list[NodeProto]] = defaultdict(list)
    for node in model.graph.node:
        for name in node.input:
            readers[name].append(node)
    features = {output.name for output in model.graph.output} & set(FEATURES)
    computes = {*_QUANTISED, "MatMul", "MultiscaleRoiAlign"}

    def enters_another(name: str, seen: set[str]) -> bool:
        if name in features:
            return True
        seen.add(name)
        return any(
            node.op_type in computes
            or (
                node.op_type in CARRIES
                and node.output[0] not in seen
                and enters_another(node.output[0], seen)
            )
            for node in readers[name]
        )

    constants = {tensor.name for tensor in model.graph.initializer}
    return [
        node
        for node in model.graph.node
        if node.op_type in _QUANTISED
        and node.input[1] in constants
        and node.input[0] not in constants
        and enters_another(node.output[0], set())
    ]


def _shortcuts(model: ModelProto, targets: list[NodeProto]) -> set[str]:
    """Return the convolution outputs that are added to another's: in int8, they let sums be fused.

    A shortcut that is the input of its residual block is quantised already.
    """
    computed = {node.output[0] for node in targets if node.op_type == "Conv"}
    computed -= {node.input[0] for node in targets}
    sums = [node for node in model.graph.node if node.op_type == "Add"]
    return {node.input[1] for node in sums if computed.issuperset(node.input)}


def _ranges(model: ModelProto, names: set[str], samples: Iterable[Sample]) -> dict[str, float]:
    """Return the largest percentile over the samples, by name of the value."""
    watched = ModelProto.FromString(model.SerializeToString())
    present = {output.name for output in watched.graph.output}
    for name in sorted(names - present - {value.name for value in watched.graph.input}):
        watched.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    session = _session(watched)
    ranges = dict.fromkeys(names, 0.0)
    outputs = [name for name in names if name in {o.name for o in session.get_outputs()}]
    count = 0
    for sample in samples:
        count += 1
        # An empty list would ask for all outputs.
        values_of = session.run(outputs, dict(sample)) if outputs else []
        found = dict(zip(outputs, values_of, strict=True))
        for name in names:
            values = np.abs(found[name] if name in found else sample[name])
            if values.size:
                ranges[name] = max(ranges[name], float(np.percentile(values, PERCENTILE)))
    if count == 0:
        raise InputError("int8: no image to find the ranges on; give a few dozen")
    return ranges


def _session(model: ModelProto) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # Fusions could remove the values that are watched.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def _around_activation(model: ModelProto, name: str, largest: float) -> list[NodeProto]:
    scale = np.float32(max(largest, 1e-8) / _LEVELS)
    model.graph.initializer.extend(
        [
            numpy_helper.from_array(np.array(scale), f"{name}/scale"),
            numpy_helper.from_array(np.zeros((), np.int8), f"{name}/zero"),
        ]
    )
    constants = [f"{name}/scale", f"{name}/zero"]
    low, back = f"{name}/int8", f"{name}/int8/float32"
    return [
        helper.make_node("QuantizeLinear", [name, *constants], [low], name=low),
        helper.make_node("DequantizeLinear", [low, *constants], [back], name=back),
    ]


def _around_weight(model: ModelProto, weight: TensorProto, axis: int) -> NodeProto:
    values = numpy_helper.to_array(weight)
    others = tuple(other for other in range(values.ndim) if other != axis)
    largest = np.abs(values).max(axis=others, keepdims=True)
    scales = (np.maximum(largest, 1e-8) / _LEVELS).astype(np.float32)
    low = np.clip(np.rint(values / scales), -_LEVELS, _LEVELS).astype(np.int8)
    name = weight.name
    model.graph.initializer.extend(
        [
            numpy_helper.from_array(low, f"{name}/int8"),
            numpy_helper.from_array(scales.ravel(), f"{name}/scale"),
            numpy_helper.from_array(np.zeros(scales.size, np.int8), f"{name}/zero"),
        ]
    )
    inputs = [f"{name}/int8", f"{name}/scale", f"{name}/zero"]
    return helper.make_node(
        "DequantizeLinear", inputs, [f"{name}/float32"], name=f"{name}/float32", axis=axis
    )
