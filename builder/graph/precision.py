"""Precision lives in the graph: pure passes over an ONNX model, in place.

TensorRT 11 takes strongly typed networks only: it computes in the types that the graph has. So
``halve`` writes the casts that make the convolutions compute in float16; what decides about boxes
(anchors, decoding, softmax, sigmoid, NMS) stays float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from onnx_ir.passes import common
from onnxscript.optimizer import fold_constants

from maskcast.builder.graph.folding import drop_unused_initializers, replace_nodes

FEATURES = ("p2", "p3", "p4", "p5")
"""The values between the two graphs; they take the type that the convolutions compute in."""

_COMPUTES = {"Conv", "ConvTranspose", "Gemm", "MatMul"}
# These only carry values on, or move them within the range of their inputs. Transpose and Gather
# are left out on purpose: behind the last layer of each head they are the first step to float32.
CARRIES = {"Add", "Clip", "Flatten", "MaxPool", "Mul", "Pad", "Relu", "Reshape", "Resize"}
# Inputs that are shapes, scales, axes: never cast.
_INTEGER_OR_FLOAT32_INPUTS = {"Resize": (1, 2, 3), "Reshape": (1,), "Pad": (1, 3)}
_HALF_MAX = float(np.finfo(np.float16).max)


def fix_size(model: ModelProto, height: int, width: int) -> None:
    """Give the inputs their height and width, so that a backend can fold what depends on them.

    The batch and the number of boxes stay dynamic. ``height`` and ``width`` are the network's
    input's; features are smaller by their strides, 4 to 32.
    """
    for value in model.graph.input:
        if value.name == "images":
            sides = (height, width)
        elif value.name in FEATURES:
            stride = 2 ** int(value.name[1])
            sides = (height // stride, width // stride)
        else:
            continue
        for dim, side in zip(value.type.tensor_type.shape.dim[2:], sides, strict=True):
            dim.dim_value = side
    # What was inferred for dynamic sides no longer holds.
    del model.graph.value_info[:]
    for value in model.graph.output:
        if value.name in FEATURES:
            stride = 2 ** int(value.name[1])
            dims = value.type.tensor_type.shape.dim
            dims[2].dim_value, dims[3].dim_value = height // stride, width // stride


def fold_shapes(model: ModelProto) -> None:
    """Compute ahead what depends on constants and known sizes only: anchors, grids, shapes."""
    graph = onnx_ir.from_proto(model)
    # Anchors of the finest level at 800x1344 are 200 * 336 * 3 boxes: 3.2 MB.
    fold_constants(
        graph, onnx_shape_inference=True, input_size_limit=1 << 20, output_size_limit=1 << 24
    )
    for simplify in (
        common.IdentityEliminationPass(),
        common.RemoveUnusedNodesPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.RemoveUnusedNodesPass(),
    ):
        simplify(graph)
    model.CopyFrom(onnx_ir.to_proto(graph))


def halve(model: ModelProto) -> None:
    """Make convolutions, matrix products and the features compute in float16.

    Call it behind ``fold_layers``. A weight outside of float16's range
    keeps its node in float32.
    """
    graph = model.graph
    floats = {t.name: t for t in graph.initializer if t.data_type == TensorProto.FLOAT}
    fixed = {output.name for output in graph.output} - set(FEATURES)
    half = {value.name for value in graph.input if value.name in FEATURES}
    nodes: list[NodeProto] = []
    cast: set[str] = set()

    def in_type(name: str, is_half: bool) -> str:
        """Name of a value in the type that is wanted; writes the cast at its first use."""
        if not name or is_half == (name in half):
            return name
        other = f"{name}/{'float16' if is_half else 'float32'}"
        if other in cast:
            return other
        cast.add(other)
        if name in floats:
            values = numpy_helper.to_array(floats[name]).astype(np.float16)
            graph.initializer.append(numpy_helper.from_array(values, other))
        else:
            to = TensorProto.FLOAT16 if is_half else TensorProto.FLOAT
            nodes.append(helper.make_node("Cast", [name], [other], name=f"cast_{other}", to=to))
        return other

    integers = _integer_values(model)
    for node in graph.node:
        data = [i for i in _data_inputs(node) if node.input[i] and node.input[i] not in integers]
        becomes_half = (
            bool(data) and not fixed & set(node.output) and _fits_half(node, data, half, floats)
        )
        for i in data:
            node.input[i] = in_type(node.input[i], becomes_half and not _is_rois(node, i))
        if becomes_half:
            half.update(node.output)
        nodes.append(node)
    replace_nodes(model, nodes)
    del graph.value_info[:]
    for value in [*graph.input, *graph.output]:
        if value.name in FEATURES and value.name in half:
            value.type.tensor_type.elem_type = TensorProto.FLOAT16
    drop_unused_initializers(model)


def _fits_half(
    node: NodeProto, data: Sequence[int], half: set[str], floats: Mapping[str, TensorProto]
) -> bool:
    """Whether a node can compute in float16."""
    if node.op_type == "MultiscaleRoiAlign":
        return node.input[0] in half
    if node.op_type in CARRIES:
        if not all(node.input[i] in half or node.input[i] in floats for i in data):
            return False
        if not any(node.input[i] in half for i in data):
            return False
    elif node.op_type not in _COMPUTES:
        return False
    constants = (
        numpy_helper.to_array(floats[node.input[i]]) for i in data if node.input[i] in floats
    )
    return all(np.abs(values).max(initial=0) <= _HALF_MAX for values in constants)


def _data_inputs(node: NodeProto) -> Iterator[int]:
    skipped = _INTEGER_OR_FLOAT32_INPUTS.get(node.op_type, ())
    return (i for i in range(len(node.input)) if i not in skipped)


def _is_rois(node: NodeProto, index: int) -> bool:
    """RoIAlign's boxes: float32 always, half a pixel at 1344 is more than float16 resolves."""
    return node.op_type == "MultiscaleRoiAlign" and index >= len(FEATURES)


def _integer_values(model: ModelProto) -> set[str]:
    """Names of the values that are no floats: indices, shapes, conditions."""
    inferred = onnx.shape_inference.infer_shapes(model)
    floats = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE)
    known: list[Any] = [*inferred.graph.value_info, *inferred.graph.input, *inferred.graph.output]
    names = {value.name for value in known if value.type.tensor_type.elem_type not in floats}
    names.update(t.name for t in model.graph.initializer if t.data_type not in floats)
    return names
