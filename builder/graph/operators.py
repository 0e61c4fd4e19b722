"""The two ONNX operators of the domain ``maskcast``: torch reference and function body.

A graph contains them as nodes. onnxruntime runs the attached function bodies, which consist of
standard operators; OpenVINO maps the nodes to its own operators when it reads the file
(``engines/openvino/operators.py``); TensorRT runs the plugins of ``engines/tensorrt/plugins``. The
torch references define what each of them must compute.
"""

from collections.abc import Callable
from typing import Any

import torch
from onnx import FunctionProto, TensorProto
from onnx.defs import OpSchema
from onnxscript import FLOAT, INT32, OnnxFunction, script
from onnxscript import opset18 as op
from onnxscript.values import Op, Opset
from torch import Tensor
from torchvision.ops import batched_nms

from maskcast.builder.network.roi_align import pool_pyramid

DOMAIN = "maskcast"
DOMAIN_VERSION = 1
OPSET = 18
"""The version of the standard operators that graphs and function bodies are written in."""

# TensorRT finds a plugin by these two; from TensorRT 10.7 on a node with them prefers the plugin
# to the function body of the same name.
PLUGIN_ATTRIBUTES = {"plugin_namespace": DOMAIN, "plugin_version": str(DOMAIN_VERSION)}


@torch.library.custom_op(f"{DOMAIN}::multiscale_roi_align", mutates_args=())
def multiscale_roi_align(
    p2: Tensor,
    p3: Tensor,
    p4: Tensor,
    p5: Tensor,
    rois: Tensor,
    batch_index: Tensor,
    output_size: int,
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    """Pool regions from P2 to P5: ``pool_pyramid`` as an operator that can be exported."""
    return pool_pyramid((p2, p3, p4, p5), rois, batch_index, output_size, sampling_ratio, aligned)


@multiscale_roi_align.register_fake
def _multiscale_roi_align_shape(
    p2: Tensor,
    p3: Tensor,
    p4: Tensor,
    p5: Tensor,
    rois: Tensor,
    batch_index: Tensor,
    output_size: int,
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    return p2.new_empty(rois.shape[0], p2.shape[1], output_size, output_size)


@torch.library.custom_op(f"{DOMAIN}::grouped_nms", mutates_args=())
def grouped_nms(
    boxes: Tensor,
    scores: Tensor,
    groups: Tensor,
    iou_threshold: float,
    score_threshold: float,
    max_output: int,
) -> Tensor:
    """Suppress overlapping boxes within groups (greedy NMS): a pyramid level's, or a class's.

    As ``torchvision.ops.batched_nms``: a kept box suppresses the boxes of its group that score less
    and whose IoU with it exceeds the threshold. Of equal scores, the lower index comes first.

    Args:
        boxes: float32 ``[B, N, 4]``, xyxy.
        scores: float32 ``[B, N]``.
        groups: int32 ``[B, N]``, from 0.
        iou_threshold: in 0..1.
        score_threshold: boxes are kept only above this score; NaN never is.
        max_output: maximum number K of boxes kept.

    Returns:
        int32 ``[B, K]``, indices into N by descending score, padded with -1.
    """
    keep = torch.full((len(boxes), max_output), -1, dtype=torch.int32, device=boxes.device)
    for image in range(len(boxes)):
        candidates = torch.where(scores[image] > score_threshold)[0]
        best_first = candidates[scores[image, candidates].argsort(descending=True, stable=True)]
        kept = best_first[
            batched_nms(
                boxes[image, best_first],
                scores[image, best_first],
                groups[image, best_first],
                iou_threshold,
            )
        ][:max_output]
        keep[image, : len(kept)] = kept.to(torch.int32)
    return keep


@grouped_nms.register_fake
def _grouped_nms_shape(
    boxes: Tensor,
    scores: Tensor,
    groups: Tensor,
    iou_threshold: float,
    score_threshold: float,
    max_output: int,
) -> Tensor:
    return boxes.new_empty(boxes.shape[0], max_output, dtype=torch.int32)


# The functions below never run as Python: onnxscript reads their source and writes ONNX nodes.

_domain = Opset(DOMAIN, DOMAIN_VERSION)
_FLOAT, _INT32, _INT64 = int(TensorProto.FLOAT), int(TensorProto.INT32), int(TensorProto.INT64)


def _pooling_functions(convention: str) -> list[OnnxFunction]:
    # Every region is pooled on all four levels and the right one is chosen: four times the work,
    # but with fixed shapes. Only onnxruntime runs this.
    @script(_domain, default_opset=op)  # type: ignore[untyped-decorator]
    def PoolLevel(  # type: ignore[no-untyped-def]  # noqa: N802
        features, rois, image, output_size: int, sampling_ratio: int, scale: float
    ) -> FLOAT:
        return op.RoiAlign(
            op.Cast(features, to=_FLOAT),
            rois,
            image,
            output_height=output_size,
            output_width=output_size,
            sampling_ratio=sampling_ratio,
            spatial_scale=scale,
            coordinate_transformation_mode=convention,
        )

    @script(_domain, default_opset=op)  # type: ignore[untyped-decorator]
    def MultiscaleRoiAlign(  # type: ignore[no-untyped-def]  # noqa: N802
        p2,
        p3,
        p4,
        p5,
        rois,
        batch_index,
        output_size: int,
        sampling_ratio: int,
        aligned: int,
        plugin_namespace: str,
        plugin_version: str,
    ) -> FLOAT:
        sides = rois[:, 2:4] - rois[:, 0:2]
        size = op.Sqrt(op.ReduceProd(sides, [1], keepdims=0))
        octaves = op.Log(size / 224.0) / 0.6931471805599453
        level = op.Unsqueeze(op.Clip(op.Floor(4.0 + octaves + 1e-6), 2.0, 5.0), [1, 2, 3])
        image = op.Cast(batch_index, to=_INT64)
        on_p2 = PoolLevel(p2, rois, image, output_size, sampling_ratio, 0.25)
        on_p3 = PoolLevel(p3, rois, image, output_size, sampling_ratio, 0.125)
        on_p4 = PoolLevel(p4, rois, image, output_size, sampling_ratio, 0.0625)
        on_p5 = PoolLevel(p5, rois, image, output_size, sampling_ratio, 0.03125)
        fine = op.Where(level == 2.0, on_p2, on_p3)
        coarse = op.Where(level == 4.0, on_p4, on_p5)
        return op.CastLike(op.Where(level < 4.0, fine, coarse), p2)

    return [PoolLevel, MultiscaleRoiAlign]


@script(_domain, default_opset=op)  # type: ignore[untyped-decorator]
def GroupedNms(  # type: ignore[no-untyped-def]  # noqa: D103, N802
    boxes,
    scores,
    groups,
    iou_threshold: float,
    score_threshold: float,
    max_output: int,
    plugin_namespace: str,
    plugin_version: str,
) -> INT32:
    # Each group is moved to a tile of its own, so that one NMS without classes handles all of them
    # and returns the best first. The tiles lie in rows of 16: in one long row the float32
    # coordinates would lose their second decimal.
    tile = op.ReduceMax(boxes, keepdims=0) + 1.0
    column = op.Cast(op.Mod(groups, 16), to=_FLOAT) * tile
    row = op.Cast(groups / 16, to=_FLOAT) * tile
    shift = op.Concat(
        op.Unsqueeze(column, [-1]),
        op.Unsqueeze(row, [-1]),
        op.Unsqueeze(column, [-1]),
        op.Unsqueeze(row, [-1]),
        axis=-1,
    )
    selected = op.NonMaxSuppression(
        boxes + shift, op.Unsqueeze(scores, [1]), max_output, iou_threshold, score_threshold
    )
    # `selected` [S, 3] is image, class, box, sorted by image. It is scattered into [B, K]: the
    # place of a row is its number minus the number of rows of all previous images.
    image = op.Squeeze(selected[:, 0:1], [1])
    batch = op.Shape(scores, start=0, end=1)
    images = op.Range(0, op.Squeeze(batch), 1)
    comes_before = op.Unsqueeze(image, [0]) < op.Unsqueeze(images, [1])
    rows_before = op.ReduceSum(op.Cast(comes_before, to=_INT64), [1], keepdims=0)
    place = op.Range(0, op.Squeeze(op.Shape(image)), 1) - op.Gather(rows_before, image)
    nothing = op.Expand(
        op.Cast(-1, to=_INT32), op.Concat(batch, op.Reshape(max_output, [1]), axis=0)
    )
    return op.ScatterND(
        nothing,
        op.Concat(op.Unsqueeze(image, [1]), op.Unsqueeze(place, [1]), axis=1),
        op.Cast(op.Squeeze(selected[:, 2:3], [1]), to=_INT32),
    )


def function_bodies(aligned: bool) -> list[FunctionProto]:
    """Return both operators as ONNX functions, for runtimes without them.

    They consist of standard operators and of ``PoolLevel``, a function that pools from one level.

    Args:
        aligned: as in the graph's MultiscaleRoiAlign nodes. ONNX's RoiAlign has a string instead,
            which a function cannot derive from the node's integer.
    """
    pooling = _pooling_functions("half_pixel" if aligned else "output_half_pixel")
    return [function.to_function_proto() for function in (*pooling, GroupedNms)]


def _operator(name: str, inputs: dict[str, str], output: str, attributes: dict[str, str]) -> Op:
    schema = OpSchema(
        name,
        DOMAIN,
        DOMAIN_VERSION,
        inputs=[OpSchema.FormalParameter(key, kind) for key, kind in inputs.items()],
        outputs=[OpSchema.FormalParameter("output", output)],
        type_constraints=[("T", ["tensor(float)", "tensor(float16)"], "the features' type")],
        attributes=[
            OpSchema.Attribute(key, getattr(OpSchema.AttrType, kind))
            for key, kind in (attributes | dict.fromkeys(PLUGIN_ATTRIBUTES, "STRING")).items()
        ],
    )
    return Op(_domain, name, schema)


_MULTISCALE_ROI_ALIGN = _operator(
    "MultiscaleRoiAlign",
    dict.fromkeys(("p2", "p3", "p4", "p5"), "T")
    | {"rois": "tensor(float)", "batch_index": "tensor(int32)"},
    "T",
    dict.fromkeys(("output_size", "sampling_ratio", "aligned"), "INT"),
)
_GROUPED_NMS = _operator(
    "GroupedNms",
    {"boxes": "tensor(float)", "scores": "tensor(float)", "groups": "tensor(int32)"},
    "tensor(int32)",
    {"iou_threshold": "FLOAT", "score_threshold": "FLOAT", "max_output": "INT"},
)


def _write_multiscale_roi_align(
    p2: Any,
    p3: Any,
    p4: Any,
    p5: Any,
    rois: Any,
    batch_index: Any,
    output_size: int,
    sampling_ratio: int,
    aligned: bool,
) -> Any:
    return _MULTISCALE_ROI_ALIGN(
        p2,
        p3,
        p4,
        p5,
        rois,
        batch_index,
        output_size=output_size,
        sampling_ratio=sampling_ratio,
        aligned=int(aligned),
        **PLUGIN_ATTRIBUTES,
    )


def _write_grouped_nms(
    boxes: Any,
    scores: Any,
    groups: Any,
    iou_threshold: float,
    score_threshold: float,
    max_output: int,
) -> Any:
    return _GROUPED_NMS(
        boxes,
        scores,
        groups,
        iou_threshold=iou_threshold,
        score_threshold=score_threshold,
        max_output=max_output,
        **PLUGIN_ATTRIBUTES,
    )


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.maskcast.multiscale_roi_align.default: _write_multiscale_roi_align,
    torch.ops.maskcast.grouped_nms.default: _write_grouped_nms,
}
"""How torch's exporter writes the two operators: its ``custom_translation_table``."""
