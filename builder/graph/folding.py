"""Folding of normalisations and paddings into the convolutions before or after them.

A bundle's graphs keep the network's own weights, under the names of its ``state_dict``. float16 and
int8 need the values that a layer computes with. The passes work in place and keep the names, see
``load_bundle_weights``.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import AttributeProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from maskcast.builder.graph.float16 import widen_weights
from maskcast.builder.graph.nodes import drop_unused_initializers, get_attribute, replace_nodes


def fold_layers(model: ModelProto) -> None:
    """Apply all passes of this module, to float32 weights."""
    widen_weights(model)
    fold_batch_norms(model)
    fold_frozen_norms(model)
    fold_pads(model)


def fold_batch_norms(model: ModelProto) -> None:
    """Fold each batch normalisation into the convolution before it.

    float16 cannot hold the variances, and int8 needs the final range of the weights. The weights
    keep the convolution's name, the biases that of the normalisation's biases.
    """
    constants = _constants(model)
    uses, producers = _uses(model), _producers(model)
    nodes = list(model.graph.node)
    for norm in model.graph.node:
        if norm.op_type != "BatchNormalization":
            continue
        conv = producers.get(norm.input[0])
        if conv is None or not _can_absorb(conv, constants, uses):
            continue
        if not all(name in constants and uses[name] == 1 for name in norm.input[1:5]):
            continue
        scale, bias, mean, variance = (constants[name] for name in norm.input[1:5])
        factor = scale / np.sqrt(variance + get_attribute(norm, "epsilon", 1e-5))
        _absorb(model, conv, constants, factor, bias - mean * factor, norm.input[2])
        conv.output[0] = norm.output[0]
        nodes.remove(norm)
    replace_nodes(model, nodes)
    drop_unused_initializers(model)


def fold_frozen_norms(model: ModelProto) -> None:
    """Fold torch's frozen batch norms, which are exported as a product and a sum per channel."""
    constants = _constants(model)
    uses, producers = _uses(model), _producers(model)
    found = []
    for added in model.graph.node:
        scaled = producers.get(added.input[0]) if added.op_type == "Add" else None
        if scaled is None or scaled.op_type != "Mul" or uses[scaled.output[0]] > 1:
            continue
        conv = producers.get(scaled.input[0])
        if conv is not None and _can_absorb(conv, constants, uses):
            found.append((conv, scaled, added))
    operands = {node.input[1] for _, scaled, added in found for node in (scaled, added)}
    known = _evaluate(model, operands) | constants
    nodes = list(model.graph.node)
    for conv, scaled, added in found:
        factor, bias = (known.get(node.input[1]) for node in (scaled, added))
        channels = (1, len(constants[conv.input[1]]), 1, 1)
        if factor is None or bias is None or not factor.shape == bias.shape == channels:
            continue
        biases = {k for k in _sources(added.input[1], producers) if k.endswith(".bias")}
        name = biases.pop() if len(biases) == 1 else f"{conv.output[0]}/bias"
        _absorb(model, conv, constants, factor.ravel(), bias.ravel(), name)
        conv.output[0] = added.output[0]
        nodes.remove(scaled)
        nodes.remove(added)
    replace_nodes(model, nodes)
    _drop_unused_nodes(model)
    drop_unused_initializers(model)


def fold_pads(model: ModelProto) -> None:
    """Fold padding with zeros into the convolutions after it.

    TensorFlow's "same" padding of strided convolutions is wider on one side than on the other.
    torch's convolutions do not support that, so their exports have a separate node for it.
    """
    constants, uses = _constants(model), _uses(model)
    readers: dict[str, list[NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    nodes = list(model.graph.node)
    for pad in model.graph.node:
        if pad.op_type != "Pad" or get_attribute(pad, "mode", b"constant") != b"constant":
            continue
        amounts = constants.get(pad.input[1])
        value = constants.get(pad.input[2]) if len(pad.input) > 2 and pad.input[2] else None
        if amounts is None or len(pad.input) > 3 or (value is not None and value.any()):
            continue
        before, after = amounts[:4], amounts[4:]
        if before[:2].any() or after[:2].any() or amounts.min() < 0:
            continue
        convolutions = readers.get(pad.output[0], [])
        if uses[pad.output[0]] != len(convolutions) or any(
            node.op_type != "Conv" or get_attribute(node, "auto_pad", b"NOTSET") != b"NOTSET"
            for node in convolutions
        ):
            continue
        around = (*before[2:], *after[2:])
        for conv in convolutions:
            own = get_attribute(conv, "pads", [0, 0, 0, 0])
            sides = [int(one + other) for one, other in zip(own, around, strict=True)]
            kept = [attribute for attribute in conv.attribute if attribute.name != "pads"]
            del conv.attribute[:]
            conv.attribute.extend(
                [*kept, AttributeProto(name="pads", type=AttributeProto.INTS, ints=sides)]
            )
            conv.input[0] = pad.input[0]
        nodes.remove(pad)
    replace_nodes(model, nodes)
    drop_unused_initializers(model)


def _absorb(
    model: ModelProto,
    conv: NodeProto,
    constants: dict[str, NDArray[Any]],
    factor: NDArray[Any],
    bias: NDArray[Any],
    bias_name: str,
) -> None:
    """Multiply a convolution's output channels by a factor and add a bias."""
    name = conv.input[1]
    before = constants[conv.input[2]] if len(conv.input) > 2 else np.zeros_like(bias)
    folded = {
        name: constants[name] * factor[:, None, None, None],
        bias_name: before * factor + bias,
    }
    # In place: protobuf frees removed messages only together with the model, so replacing the list
    # for each convolution would keep a copy of all weights each time.
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    for key, values in folded.items():
        tensor = stored[key] if key in stored else model.graph.initializer.add()
        tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float32), key))
    del conv.input[1:]
    conv.input.extend(folded)


def _can_absorb(conv: NodeProto, constants: dict[str, Any], uses: Counter[str]) -> bool:
    return (
        conv.op_type == "Conv"
        and uses[conv.output[0]] == 1
        and conv.input[1] in constants
        and uses[conv.input[1]] == 1
        and all(name in constants for name in conv.input[2:])
    )


def _evaluate(model: ModelProto, names: set[str]) -> dict[str, NDArray[Any]]:
    """Compute the values, among these names, that depend on constants alone."""
    constants, producers = _constants(model), _producers(model)
    wanted = sorted(
        name
        for name in names
        if name in producers and all(source in constants for source in _sources(name, producers))
    )
    if not wanted:
        return {}
    needed = set().union(*(_ancestors(name, producers) for name in wanted))
    graph = helper.make_graph(
        [node for node in model.graph.node if needed & set(node.output)],
        "constants",
        [],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in wanted],
        [tensor for tensor in model.graph.initializer if tensor.name in needed],
    )
    part = helper.make_model(graph, opset_imports=model.opset_import)
    return dict(zip(wanted, ReferenceEvaluator(part).run(wanted, {}), strict=True))


def _ancestors(name: str, producers: dict[str, NodeProto]) -> set[str]:
    """Return the names of all values that a value is computed from, itself included."""
    if name not in producers:
        return {name}
    return {name}.union(*(_ancestors(source, producers) for source in producers[name].input))


def _sources(name: str, producers: dict[str, NodeProto]) -> set[str]:
    """Return the names of the inputs and constants that a value is computed from."""
    return {ancestor for ancestor in _ancestors(name, producers) if ancestor not in producers}


def _drop_unused_nodes(model: ModelProto) -> None:
    nodes, used = [], {output.name for output in model.graph.output}
    for node in reversed(model.graph.node):
        if used & set(node.output):
            nodes.append(node)
            used.update(node.input)
    replace_nodes(model, nodes[::-1])


def _constants(model: ModelProto) -> dict[str, NDArray[Any]]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def _producers(model: ModelProto) -> dict[str, NodeProto]:
    return {name: node for node in model.graph.node for name in node.output}


def _uses(model: ModelProto) -> Counter[str]:
    uses = Counter(name for node in model.graph.node for name in node.input)
    uses.update(output.name for output in model.graph.output)
    return uses
