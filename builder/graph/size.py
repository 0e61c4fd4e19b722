"""Fixed input sizes: set them in a graph and fold what depends on them, in place."""

from __future__ import annotations

import onnx_ir
from onnx import ModelProto
from onnx_ir.passes import common
from onnxscript.optimizer import fold_constants

FEATURES = ("p2", "p3", "p4", "p5")
"""The detector's features, which the other graphs take; of the type of its convolutions."""


def fix_size(model: ModelProto, height: int, width: int) -> None:
    """Fix the size of the network's input, so that a backend can fold what depends on it.

    Features are smaller by their strides, 4 to 32. The batch and the number of boxes stay dynamic.
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
    # Shapes that were inferred for dynamic sides no longer hold.
    del model.graph.value_info[:]
    for value in model.graph.output:
        if value.name in FEATURES:
            stride = 2 ** int(value.name[1])
            dims = value.type.tensor_type.shape.dim
            dims[2].dim_value, dims[3].dim_value = height // stride, width // stride


def fold_shapes(model: ModelProto) -> None:
    """Fold what depends on constants and known sizes only: anchors, grids, shapes."""
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
