"""Helpers of the passes over ONNX models: nodes, initializers and attributes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from onnx import AttributeProto, ModelProto, NodeProto


def replace_nodes(model: ModelProto, nodes: Sequence[NodeProto]) -> None:
    """Replace the nodes of a model; ``nodes`` may be some of its own."""
    kept = [NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del model.graph.node[:]
    model.graph.node.extend(kept)


def drop_unused_initializers(model: ModelProto) -> None:
    """Drop the constants that no node reads."""
    used = {name for node in model.graph.node for name in node.input}
    used.update(output.name for output in model.graph.output)
    kept = [tensor for tensor in model.graph.initializer if tensor.name in used]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)


def get_attribute(node: NodeProto, name: str, default: Any = None) -> Any:
    """Return an attribute of a node, or the default if the node does not have it."""
    for attribute in node.attribute:
        if attribute.name == name:
            return _VALUE[attribute.type](attribute)
    return default


_VALUE: dict[int, Any] = {
    AttributeProto.INT: lambda attribute: attribute.i,
    AttributeProto.FLOAT: lambda attribute: attribute.f,
    AttributeProto.STRING: lambda attribute: attribute.s,
    AttributeProto.INTS: lambda attribute: list(attribute.ints),
}
