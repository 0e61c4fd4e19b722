"""Export to portable ONNX graphs: one file for every backend, batch and input size."""

import logging
import re
import warnings
from collections.abc import Callable
from typing import Any

import onnx
import onnx_ir
import torch
from onnx import ModelProto
from onnx_ir.passes import common
from onnxscript.optimizer import fold_constants
from torch import Tensor
from torch.export import Dim

from maskcast.builder.graph.operators import (
    DOMAIN,
    DOMAIN_VERSION,
    OPSET,
    TRANSLATIONS,
    function_bodies,
)
from maskcast.builder.network.detector import Detector, Poser, Segmenter

DETECTOR_INPUTS = ("images", "sizes")
DETECTOR_OUTPUTS = ("boxes", "scores", "labels", "counts", "p2", "p3", "p4", "p5")
SEGMENTER_INPUTS = ("p2", "p3", "p4", "p5", "boxes", "labels", "batch_index")
SEGMENTER_OUTPUTS = ("masks",)
POSER_INPUTS = ("p2", "p3", "p4", "p5", "boxes", "batch_index")
POSER_OUTPUTS = ("heatmaps",)

_IR_VERSION = 10
"""That of ONNX 1.16 and onnxruntime 1.18; the exporter writes the newest."""

_STRIDES = (4, 8, 16, 32)


def export_detector(model: Any) -> ModelProto:
    """Export the detector of a torchvision FasterRCNN or MaskRCNN.

    Batch, height and width are dynamic; the sides are multiples of 32, from 64.

    Raises:
        InputError: the model's pyramid is not P2 to P6.
    """
    batch, rows, columns = _dimension("batch"), _dimension("h"), _dimension("w")
    graph = _export(
        Detector(model),
        (torch.zeros(2, 3, 320, 576), torch.tensor([[320.0, 576.0]] * 2)),
        ({0: batch, 2: 32 * rows, 3: 32 * columns}, {0: batch}),
        DETECTOR_INPUTS,
        DETECTOR_OUTPUTS,
    )
    _name_sides(graph)
    return graph


def export_segmenter(model: Any) -> ModelProto:
    """Export the segmenter of a torchvision MaskRCNN; batch, size and box count are dynamic."""
    of_boxes = {"labels": torch.ones(3, dtype=torch.int64)}
    return _export_branch(Segmenter(model), model, of_boxes, SEGMENTER_INPUTS, SEGMENTER_OUTPUTS)


def export_poser(model: Any) -> ModelProto:
    """Export the keypoint branch of a torchvision network; dynamic like the segmenter."""
    return _export_branch(Poser(model), model, {}, POSER_INPUTS, POSER_OUTPUTS)


def _export_branch(
    module: Segmenter | Poser,
    model: Any,
    of_boxes: dict[str, Tensor],
    inputs: tuple[str, ...],
    outputs: tuple[str, ...],
) -> ModelProto:
    """Export a module of features and boxes; ``of_boxes`` are further inputs, one row per box."""
    channels = model.backbone.out_channels
    batch, rows, columns = _dimension("batch"), _dimension("h"), _dimension("w")
    boxes = _dimension("r")
    features = [torch.zeros(2, channels, 320 // stride, 576 // stride) for stride in _STRIDES]
    sides = [{0: batch, 2: 32 // s * rows, 3: 32 // s * columns} for s in _STRIDES]
    of_each = (
        torch.tensor([[8.0, 8.0, 40.0, 40.0]] * 3),
        *of_boxes.values(),
        torch.zeros(3, dtype=torch.int32),
    )
    return _export(
        module, (*features, *of_each), (*sides, *({0: boxes} for _ in of_each)), inputs, outputs
    )


def _dimension(name: str) -> Any:
    # Sizes of 0 and 1 are never symbolic in torch.export; the example inputs avoid them. Batches
    # and box counts of 1 work nevertheless, sides of 1 do not.
    return Dim(name, min=2 if name in "hw" else 1)


def _export(
    module: Detector | Segmenter | Poser,
    example: tuple[Tensor, ...],
    dynamic_shapes: tuple[dict[int, Any], ...],
    inputs: tuple[str, ...],
    outputs: tuple[str, ...],
) -> ModelProto:
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the exporter's own code
            program = torch.onnx.export(
                module.eval(),
                example,
                input_names=inputs,
                output_names=outputs,
                dynamic_shapes=dynamic_shapes,
                opset_version=OPSET,
                dynamo=True,
                optimize=False,
                verbose=False,
                custom_translation_table=TRANSLATIONS,
            )
    finally:
        logger.setLevel(level)
    assert program is not None
    model = program.model
    _simplify(model, keep=set(module.state_dict()))
    graph = onnx_ir.to_proto(model)
    graph.ir_version = _IR_VERSION
    if all(entry.domain != DOMAIN for entry in graph.opset_import):
        graph.opset_import.append(onnx.helper.make_opsetid(DOMAIN, DOMAIN_VERSION))
    graph.functions.extend(function_bodies(module.pooling[2]))
    onnx.checker.check_model(graph, full_check=True)
    return graph


def _name_sides(graph: ModelProto) -> None:
    """Name the sides h and w in the outputs too; the exporter names them by numbers."""
    *_, p5 = graph.graph.output
    symbols = [side.dim_param for side in p5.type.tensor_type.shape.dim[2:]]
    for value in [*graph.graph.output, *graph.graph.value_info]:
        for side in value.type.tensor_type.shape.dim:
            for symbol, name in zip(symbols, "hw", strict=True):
                if symbol in side.dim_param:
                    side.dim_param = re.sub(rf"\b{symbol}\b", name, side.dim_param)


def _simplify(model: onnx_ir.Model, keep: set[str]) -> None:
    """Fold shape arithmetic into constants, in place, but keep the weights named in ``keep``.

    The exporter's own optimisation would fuse batch norms into convolutions. The backends do that
    too, and a graph with its original weights can be converted back to a network.
    """

    def uses_weights(node: onnx_ir.Node) -> bool | None:
        named = any(value is not None and value.name in keep for value in node.inputs)
        return False if named else None

    fold_constants(model, onnx_shape_inference=True, should_fold=uses_weights)
    passes: list[Callable[[onnx_ir.Model], Any]] = [
        common.IdentityEliminationPass(),
        common.RemoveUnusedNodesPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.CommonSubexpressionEliminationPass(),
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedOpsetsPass(),
        common.ClearMetadataAndDocStringPass(),  # it has paths of the exporting machine
    ]
    for simplify in passes:
        simplify(model)
