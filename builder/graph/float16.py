"""float16 in ONNX graphs, for computing and for storing weights. Graphs are changed in place.

TensorRT 11 accepts only strongly typed networks: it computes in the types of the graph. Therefore
``compute_in_float16`` inserts the casts that make the convolutions compute in float16. Operators
that decide on boxes (anchors, decoding, softmax, sigmoid, NMS) stay float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from maskcast.builder.graph.nodes import drop_unused_initializers, get_attribute, replace_nodes
from maskcast.builder.graph.size import FEATURES

_COMPUTES = {"Conv", "ConvTranspose", "Gemm", "MatMul"}
# These pass values on, or keep them within the range of their inputs. Transpose and Gather are left
# out on purpose: after the last layer of each head they are the first step in float32.
CARRIES = {"Add", "Clip", "Flatten", "MaxPool", "Mul", "Pad", "Relu", "Reshape", "Resize"}
# Inputs that are shapes, scales or axes are never cast.
_INTEGER_OR_FLOAT32_INPUTS = {"Resize": (1, 2, 3), "Reshape": (1,), "Pad": (1, 3)}
_FLOAT16_SCALES = 19
"""The first version of ONNX's operators in which the scales of Q/DQ nodes may be float16."""
_HALF_MAX = float(np.finfo(np.float16).max)


def compute_in_float16(model: ModelProto) -> None:
    """Make convolutions, matrix products and the features compute in float16.

    Call it after ``fold_layers``. A node with a weight outside float16's range stays float32. In a
    quantised graph this changes what int8 does not cover: sums, resizing, the last layers, the
    features. The scales become float16, and so do the values between Q/DQ nodes and convolutions.
    """
    graph = model.graph
    if _normalise_scales(model):
        _require_opset(model, _FLOAT16_SCALES)
    floats = {t.name: t for t in graph.initializer if t.data_type == TensorProto.FLOAT}
    fixed = {output.name for output in graph.output} - set(FEATURES)
    half = {value.name for value in graph.input if value.name in FEATURES}
    nodes: list[NodeProto] = []
    cast: set[str] = set()

    def in_type(name: str, is_half: bool) -> str:
        """Return the name of a value in a type; write the cast at its first use."""
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
            half.update(name for name in node.output if name not in integers)
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
    """Return whether a node can compute in float16."""
    if node.op_type in ("MultiscaleRoiAlign", "QuantizeLinear"):
        return node.input[0] in half
    if node.op_type == "DequantizeLinear":
        return True
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


def _normalise_scales(model: ModelProto) -> bool:
    """Raise scales that float16 cannot hold as normal numbers; return whether there are scales.

    The weights of such a channel are almost zero. They are rounded to the larger step.
    """
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    tiny = np.float32(np.finfo(np.float16).tiny)
    found = False
    old: dict[str, Any] = {}
    for node in model.graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        found = True
        name, values = node.input[1], node.input[0]
        if name not in stored:
            continue
        if name not in old:
            old[name] = numpy_helper.to_array(stored[name])
            raised = np.maximum(old[name], tiny)
            stored[name].CopyFrom(numpy_helper.from_array(raised, name))
        if values in stored and (old[name] < tiny).any():
            weights = numpy_helper.to_array(stored[values])
            shape = [1] * weights.ndim
            if old[name].ndim:
                axis = get_attribute(node, "axis")
                shape[1 if axis is None else axis] = -1
            ratio = (old[name] / np.maximum(old[name], tiny)).reshape(shape)
            rounded = np.rint(weights * ratio).astype(weights.dtype)
            stored[values].CopyFrom(numpy_helper.from_array(rounded, values))
    return found


def _require_opset(model: ModelProto, version: int) -> None:
    """Raise the version of ONNX's operators; the graphs use none that differ."""
    for imported in model.opset_import:
        if imported.domain == "":
            imported.version = max(imported.version, version)


def _data_inputs(node: NodeProto) -> Iterator[int]:
    skipped = _INTEGER_OR_FLOAT32_INPUTS.get(node.op_type, ())
    return (i for i in range(len(node.input)) if i not in skipped)


def _is_rois(node: NodeProto, index: int) -> bool:
    """Return whether an input is RoIAlign's boxes: at 1344, float16 cannot resolve half a pixel."""
    return node.op_type == "MultiscaleRoiAlign" and index >= len(FEATURES)


def _integer_values(model: ModelProto) -> set[str]:
    """Return the names of the values that are not floats: indices, shapes, conditions."""
    inferred = onnx.shape_inference.infer_shapes(model)
    floats = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE)
    known: list[Any] = [*inferred.graph.value_info, *inferred.graph.input, *inferred.graph.output]
    names = {value.name for value in known if value.type.tensor_type.elem_type not in floats}
    names.update(t.name for t in model.graph.initializer if t.data_type not in floats)
    return names


def store_float16(graph: ModelProto) -> None:
    """Store every matrix and kernel as float16, cast back to float32 where it is used.

    This halves the file, and computing stays float32. Vectors (biases, batch-norm statistics) stay
    float32: they are small, and a variance may lie outside float16's range.
    """
    casts, halved = [], set()
    for tensor in graph.graph.initializer:
        if tensor.data_type != TensorProto.FLOAT or len(tensor.dims) < 2:
            continue
        with np.errstate(over="ignore"):
            half = numpy_helper.to_array(tensor).astype(np.float16)
        if not np.isfinite(half).all():
            continue
        wide = f"{tensor.name}/float32"
        for node in graph.graph.node:
            for index, name in enumerate(node.input):
                if name == tensor.name:
                    node.input[index] = wide
        casts.append(helper.make_node("Cast", [tensor.name], [wide], to=TensorProto.FLOAT))
        tensor.CopyFrom(numpy_helper.from_array(half, tensor.name))
        halved.add(tensor.name)
    known = [value for value in graph.graph.value_info if value.name not in halved]
    del graph.graph.value_info[:]
    graph.graph.value_info.extend(known)
    nodes = [*casts, *graph.graph.node]
    del graph.graph.node[:]
    graph.graph.node.extend(nodes)


def widen_weights(model: ModelProto) -> None:
    """Turn initializers that are stored as float16 and cast to float32 into float32 ones."""
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes, renamed = [], {}
    for node in model.graph.node:
        source = stored.get(node.input[0]) if node.op_type == "Cast" else None
        if (
            source is None
            or source.data_type != TensorProto.FLOAT16
            or get_attribute(node, "to") != TensorProto.FLOAT
        ):
            nodes.append(node)
            continue
        renamed[node.output[0]] = source.name
    for name in set(renamed.values()):
        values = numpy_helper.to_array(stored[name]).astype(np.float32)
        stored[name].CopyFrom(numpy_helper.from_array(values, name))
    for node in nodes:
        for place, name in enumerate(node.input):
            node.input[place] = renamed.get(name, name)
    replace_nodes(model, nodes)
    known = [value for value in model.graph.value_info if value.name not in renamed.values()]
    del model.graph.value_info[:]
    model.graph.value_info.extend(known)
