"""The operators of the domain ``maskcast``, built from OpenVINO's own when it reads a graph."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import openvino.opset15 as op
from openvino import Node

from maskcast.engines.errors import InputError

_DOMAIN = "maskcast"
_STRIDES = (4, 8, 16, 32)
_TILES_PER_ROW = 16
_POOLED = "maskcast_pooled"


def read_graph(path: Path) -> ov.Model:
    """Read a portable graph of a bundle, an ONNX file.

    The number of regions must be fixed before the graph is compiled: OpenVINO's embedding bag,
    which pools them, requires it.

    Raises:
        InputError: OpenVINO cannot read it.
    """
    # Imported here: it takes 3 MB, and nothing is read where compiled graphs are in the cache.
    from openvino.frontend.onnx import ConversionExtension

    def convert_pooling(node: Any) -> list[Any]:
        pooled = multiscale_roi_align(
            [node.get_input(index) for index in range(4)],
            node.get_input(4),
            node.get_input(5),
            node.get_attribute("output_size"),
            node.get_attribute("sampling_ratio"),
            bool(node.get_attribute("aligned")),
        )
        mark_pooled(pooled)
        outputs: list[Any] = pooled.outputs()
        return outputs

    def convert_nms(node: Any) -> list[Any]:
        outputs: list[Any] = grouped_nms(
            node.get_input(0),
            node.get_input(1),
            node.get_input(2),
            node.get_attribute("iou_threshold"),
            node.get_attribute("score_threshold"),
            node.get_attribute("max_output"),
        ).outputs()
        return outputs

    reader = ov.Core()  # one for each graph, because a core keeps its extensions
    reader.add_extension(ConversionExtension("MultiscaleRoiAlign", _DOMAIN, convert_pooling))
    reader.add_extension(ConversionExtension("GroupedNms", _DOMAIN, convert_nms))
    try:
        return reader.read_model(path)
    except RuntimeError:  # the message is a C++ trace of many lines
        raise InputError(
            f"{path}: OpenVINO cannot read this graph; build the bundle again"
        ) from None


def mark_pooled(node: Node) -> None:
    """Mark a node whose output is that of MultiscaleRoiAlign."""
    node.get_rt_info()[_POOLED] = ""


def is_pooled(node: Node) -> bool:
    """Return whether a node's output is that of MultiscaleRoiAlign."""
    return _POOLED in node.get_rt_info()


def multiscale_roi_align(
    features: list[Any],
    rois: Any,
    batch_index: Any,
    output_size: int,
    sampling_ratio: int,
    aligned: bool,
) -> Node:
    """Build RoIAlign as weighted sums of rows in one table of all levels' cells.

    Every bin is a sum of 4 bilinear neighbours for each of its samples. With channels last, a
    neighbour is one contiguous row, which an embedding bag gathers and sums; OpenVINO's ROIAlign
    gathers single numbers, one level at a time. This is 1.3 to 2 times faster, and one operator
    serves all levels and images.
    """
    tables, heights, widths = [], [], []
    for level in features:
        last = op.transpose(level, _ints([0, 2, 3, 1]))
        tables.append(op.reshape(last, _ints([-1, _channels(level)]), False))
        shape = op.convert(op.shape_of(level), "f32")
        heights.append(op.gather(shape, _ints([2]), _ints(0)))
        widths.append(op.gather(shape, _ints([3]), _ints(0)))
    # Rows of the table are counted in floats, which are exact up to 16 million: OpenVINO's sums of
    # integers are five times slower.
    height, width = op.concat(heights, 0), op.concat(widths, 0)
    batch = op.gather(op.convert(op.shape_of(features[0]), "f32"), _ints([0]), _ints(0))
    rows_of_image = op.multiply(height, width)
    first_row = op.cum_sum(op.multiply(rows_of_image, batch), _ints(0), exclusive=True)

    level = op.convert(_level(rois), "i32")
    height, width = (op.gather(side, level, _ints(0)) for side in (height, width))
    scale = op.gather(_floats([1 / stride for stride in _STRIDES]), level, _ints(0))
    first_row = op.add(
        op.gather(first_row, level, _ints(0)),
        op.multiply(op.gather(rows_of_image, level, _ints(0)), op.convert(batch_index, "f32")),
    )

    scaled = op.multiply(rois, op.reshape(scale, _ints([-1, 1]), False))
    if aligned:
        scaled = op.subtract(scaled, _floats(0.5))
    start, end = (
        op.gather(scaled, _ints([0, 1]), _ints(1)),
        op.gather(scaled, _ints([2, 3]), _ints(1)),
    )
    side = op.subtract(end, start)
    if not aligned:
        side = op.maximum(side, _floats(1.0))
    # Each sample twice: for the cell before it and the one after it.
    samples = output_size * sampling_ratio
    offsets = np.repeat((np.arange(samples) + 0.5) / samples, 2)
    behind = np.tile([0.0, 1.0], samples)
    position = op.add(  # [R, 2, 2 * samples], x before y
        op.reshape(start, _ints([-1, 2, 1]), False),
        op.multiply(op.reshape(side, _ints([-1, 2, 1]), False), _floats(offsets[None, None])),
    )
    limit = op.concat([op.reshape(value, _ints([-1, 1, 1]), False) for value in (width, height)], 1)
    # As in torchvision.ops.roi_align: samples up to one cell outside take the nearest cell, those
    # further out are zero.
    inside = op.logical_and(
        op.greater_equal(position, _floats(-1.0)), op.less_equal(position, limit)
    )
    last = op.subtract(limit, _floats(1.0))
    position = op.minimum(op.maximum(position, _floats(0.0)), last)
    before = op.floor(position)
    share = op.add(  # 1 - x of the cell before, x of the one after
        op.multiply(op.subtract(position, before), _floats((2 * behind - 1)[None, None])),
        _floats((1 - behind)[None, None]),
    )
    share = op.multiply(share, op.convert(inside, "f32"))
    cell = op.minimum(op.add(before, _floats(behind[None, None])), last)
    neighbours = 2 * sampling_ratio

    def by_bin(values: Any, axis: int) -> Any:
        of_axis = op.gather(values, _ints(axis), _ints(1))
        return op.reshape(of_axis, _ints([-1, output_size, neighbours]), False)

    def by_row_and_column(combine: Any, rows: Any, columns: Any) -> Any:
        rows = op.reshape(rows, _ints([-1, output_size, 1, neighbours, 1]), False)
        columns = op.reshape(columns, _ints([-1, 1, output_size, 1, neighbours]), False)
        return op.reshape(combine(rows, columns), _ints([-1, neighbours**2]), False)

    rows = op.add(
        op.multiply(by_bin(cell, 1), op.reshape(width, _ints([-1, 1, 1]), False)),
        op.reshape(first_row, _ints([-1, 1, 1]), False),
    )
    weights = by_row_and_column(op.multiply, by_bin(share, 1), by_bin(share, 0))
    pooled = op.embedding_bag_packed_sum(
        op.concat(tables, 0),
        op.convert(by_row_and_column(op.add, rows, by_bin(cell, 0)), "i32"),
        op.multiply(weights, _floats(1 / sampling_ratio**2)),
    )
    grid = op.reshape(pooled, _ints([-1, output_size, output_size, _channels(features[0])]), False)
    return op.transpose(grid, _ints([0, 3, 1, 2]))


def grouped_nms(
    boxes: Any, scores: Any, groups: Any, iou_threshold: float, score_threshold: float, count: int
) -> Node:
    """Build the function body of ``builder/graph/operators.py`` from OpenVINO's operators."""
    tile = op.add(op.reduce_max(boxes, _ints([0, 1, 2])), _floats(1.0))
    groups = op.convert(groups, "i32")
    columns = op.constant(np.int32(_TILES_PER_ROW))
    column = op.multiply(op.convert(op.mod(groups, columns), "f32"), tile)
    row = op.multiply(op.convert(op.divide(groups, columns), "f32"), tile)
    shift = op.concat([op.unsqueeze(value, _ints(2)) for value in (column, row, column, row)], 2)
    selected = op.non_max_suppression(
        op.add(boxes, shift),
        op.unsqueeze(scores, _ints(1)),
        _ints(count),
        _floats(iou_threshold),
        _floats(score_threshold),
        box_encoding="corner",
        sort_result_descending=False,
        output_type="i32",
    )
    rows = selected.output(0)  # [S, 3]: image, class, box
    image = op.gather(rows, op.constant(np.int32(0)), _ints(1))
    box = op.gather(rows, op.constant(np.int32(2)), _ints(1))
    batch = op.gather(op.shape_of(scores, output_type="i32"), _ints(0), _ints(0))
    zero, one = op.constant(np.int32(0)), op.constant(np.int32(1))
    images = op.range(zero, batch, one, "i32")
    comes_before = op.less(op.unsqueeze(image, _ints(0)), op.unsqueeze(images, _ints(1)))
    rows_before = op.reduce_sum(op.convert(comes_before, "i32"), _ints(1))
    found = op.gather(op.shape_of(image, output_type="i32"), _ints(0), _ints(0))
    place = op.subtract(op.range(zero, found, one, "i32"), op.gather(rows_before, image, _ints(0)))
    nothing = op.broadcast(
        op.constant(np.int32(-1)),
        op.concat([op.unsqueeze(batch, _ints(0)), op.constant(np.array([count], np.int32))], 0),
    )
    places = op.concat([op.unsqueeze(value, _ints(1)) for value in (image, place)], 1)
    return op.scatter_nd_update(nothing, places, box)


def _level(rois: Any) -> Node:
    """Return the level, P2 (0) to P5 (3) as float, of each region: equation 1 of the FPN paper."""
    start, end = op.gather(rois, _ints([0, 1]), _ints(1)), op.gather(rois, _ints([2, 3]), _ints(1))
    area = op.reduce_prod(op.subtract(end, start), _ints([1]))
    octaves = op.divide(op.log(op.divide(op.sqrt(area), _floats(224.0))), _floats(np.log(2.0)))
    return op.clamp(op.floor(op.add(octaves, _floats(2 + 1e-6))), 0.0, 3.0)


def _channels(features: Any) -> int:
    length: int = features.get_partial_shape()[1].get_length()
    return length


def _ints(values: Any) -> Node:
    return op.constant(np.asarray(values, np.int64))


def _floats(values: Any) -> Node:
    return op.constant(np.asarray(values, np.float32))
