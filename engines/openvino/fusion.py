"""Rewrites of a graph that let OpenVINO fuse more of it, without loss of precision.

All work in place on graphs from ``read_graph`` and leave unknown patterns unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import openvino.opset15 as op
from numpy.typing import NDArray
from openvino import Model, Node

_LEVELS = 256
_FINE_LEVELS = 60_001
"""Rounds about 100 times finer than bytes; with this number of levels, OpenVINO uses floats."""


def fuse(model: Model) -> None:
    """Apply the rewrites that help in every graph."""
    use_unsigned_bytes(model)
    quantise_before_pooling(model)
    add_in_bytes(model)
    join_narrow_convolutions(model)


def use_unsigned_bytes(model: Model) -> None:
    """Quantise values that are never negative in 256 steps instead of the 128 of a symmetric range.

    The Q/DQ nodes of a graph are symmetric because TensorRT supports nothing else. Convolutions in
    OpenVINO read unsigned bytes; for signed ones they would have to correct for the zero point.
    """
    for quantise in model.get_ordered_ops():
        if quantise.get_type_name() != "FakeQuantize":
            continue
        last = _dequantised(quantise)
        if last is None or not _is_non_negative(quantise.input_value(0).get_node()):
            continue
        largest = np.float32(_bound(quantise) * 127 / 128)
        zero = np.float32(0)
        unsigned = op.fake_quantize(quantise.input_value(0), zero, largest, zero, largest, _LEVELS)
        unsigned.set_friendly_name(last.get_friendly_name())
        _replace(last, unsigned)


def quantise_before_pooling(model: Model) -> None:
    """Take the maximum of bytes instead of floats: rounding does not change which is largest.

    Only for unsigned bytes: OpenVINO loses the zero point after a pooling.
    """
    for pool in model.get_ordered_ops():
        if pool.get_type_name() != "MaxPool":
            continue
        readers = _readers(pool)
        if len(readers) != 1 or readers[0].get_type_name() != "FakeQuantize":
            continue
        (quantise,) = readers
        if _constant(quantise.input_value(1).get_node()).min() < 0:
            continue
        _replace(quantise, pool)
        quantise.input(0).replace_source_output(pool.input_value(0))
        pool.input(0).replace_source_output(quantise.output(0))


def add_in_bytes(model: Model) -> None:
    """Let a convolution add the bytes of a shortcut, or of the level above, to its own results.

    OpenVINO does so only if there is a quantisation between the convolution and the sum. The one
    that is inserted has practically no effect: its steps are fine, and it clips only values that
    the quantisation of the sum clips too, whatever the shortcut adds.
    """
    for total in model.get_ordered_ops():
        if total.get_type_name() != "Add":
            continue
        quantise = _only_reader(total)
        if quantise is not None and quantise.get_type_name() == "Relu":
            quantise = _only_reader(quantise)
        if quantise is None or quantise.get_type_name() != "FakeQuantize":
            continue
        sides = [total.input_value(side).get_node() for side in range(2)]
        for side, other in ((0, 1), (1, 0)):
            shortcut = _quantiser(sides[other])
            if shortcut is None or not _is_convolution(sides[side]):
                continue
            limit = np.float32(_bound(quantise) + _bound(shortcut))
            fine = op.fake_quantize(sides[side], -limit, limit, -limit, limit, _FINE_LEVELS)
            total.input(side).replace_source_output(fine.output(0))
            break


def join_narrow_convolutions(model: Model) -> None:
    """Join convolutions that read the same float values and have few output channels each.

    Most of their time is spent reading. In the RPN head these are objectness and boxes.
    """
    for node in model.get_ordered_ops():
        found = [
            (reader, biased)
            for reader in _readers(node)
            if _is_float_convolution(reader, node)
            and (biased := _only_reader(reader)) is not None
            and _is_convolution(biased)
        ]
        if len(found) < 2:
            continue
        first, _ = found[0]
        attributes = first.get_attributes()
        if any(conv.get_attributes() != attributes for conv, _ in found):
            continue
        weights = [_constant(conv.input_value(1).get_node()) for conv, _ in found]
        channels = [len(weight) for weight in weights]
        if sum(channels) >= weights[0].shape[1]:
            continue
        biases = [_constant(biased.input_value(1).get_node()).ravel() for _, biased in found]
        weight = op.constant(np.concatenate(weights))
        weight.set_friendly_name(first.input_value(1).get_node().get_friendly_name())
        joined = op.convolution(
            node,
            weight,
            attributes["strides"],
            attributes["pads_begin"],
            attributes["pads_end"],
            attributes["dilations"],
        )
        joined.set_friendly_name(first.get_friendly_name())
        joined = op.add(joined, op.constant(np.concatenate(biases).reshape(1, -1, 1, 1)))
        batch, _, height, width = joined.get_output_shape(0)
        # Flat, so that splitting the channels needs no copy.
        flat = op.reshape(joined, _ints([batch, sum(channels), height * width]), False)
        parts = op.variadic_split(flat, _ints(1), _ints(channels))
        for part, (_, biased), count in zip(parts.outputs(), found, channels, strict=True):
            _replace(biased, op.reshape(part, _ints([batch, count, height, width]), False))


def convolve_rows(model: Model) -> None:
    """Compute int8 products of rows with a layer's weights as 1x1 convolutions.

    For ``[R, K]`` times ``[O, K]`` oneDNN's convolution is faster by a fifth. The operators up to
    the next quantisation are moved with the product.
    """
    for product in model.get_ordered_ops():
        weights = _kernel_of_rows(product)
        if weights is None or _quantiser(product.input_value(0).get_node()) is None:
            continue
        rows, inputs = product.get_input_shape(0)
        outputs = product.get_output_shape(0)[1]
        line = op.reshape(product.input_value(0), _ints([1, rows, 1, inputs]), False)
        data = op.transpose(line, _ints([0, 3, 1, 2]))
        convolved = op.convolution(data, weights, [1, 1], [0, 0], [0, 0], [1, 1])
        convolved.set_friendly_name(product.get_friendly_name())
        last = product
        scaled = _only_reader(last)
        if scaled is not None and _without_factor(scaled) is not scaled:
            last = scaled
        biased = _only_reader(last)
        if biased is not None and biased.get_type_name() == "Add":
            bias = _without_factor(biased.input_value(1).get_node())
            if _is_constant(bias):
                values = op.constant(_constant(bias).reshape(1, -1, 1, 1))
                convolved, last = op.add(convolved, values), biased
        active = _only_reader(last)
        if active is not None and active.get_type_name() == "Relu":
            convolved, last = op.relu(convolved), active
        quantise = _only_reader(last)
        if quantise is not None and quantise.get_type_name() == "FakeQuantize":
            limits = [quantise.input_value(place) for place in range(1, 5)]
            convolved, last = op.fake_quantize(convolved, *limits, _LEVELS), quantise
        back = op.transpose(convolved, _ints([0, 2, 3, 1]))
        _replace(last, op.reshape(back, _ints([rows, outputs]), False))


def _kernel_of_rows(product: Node) -> Node | None:
    """Turn the int8 weights of a product ``[O, K]`` into a convolution's ``[O, K, 1, 1]``."""
    if (
        product.get_type_name() != "MatMul"
        or product.get_input_partial_shape(0).is_dynamic
        or len(product.get_input_shape(0)) != 2
        or product.get_attributes()["transpose_a"]
        or not product.get_attributes()["transpose_b"]
    ):
        return None
    return _stored(product.input_value(1).get_node(), lambda values: values[:, :, None, None])


def multiply_before_upsampling(model: Model) -> None:
    """Put a mask's pixels in order after the product with its class's weights, not before.

    A transposed convolution of kernel 2 and stride 2 is a 1x1 convolution to four pixels per cell,
    which oneDNN computes in two thirds of the time. Only one number per pixel then has to be moved
    to its place. The order of the product ``[R, 1, C]`` times ``[R, C, pixels]`` is reversed,
    because the convolution leaves channels last.
    """
    for up in model.get_ordered_ops():
        if up.get_type_name() != "ConvolutionBackpropData" or not _doubles(up):
            continue
        line = _line(up, ("Add", "Relu", "Reshape", "MatMul"))
        weights = _kernel_as_channels(up.input_value(1).get_node())
        if line is None or weights is None:
            continue
        biased, _, flat, product = line
        if product.input_value(1).get_node().get_name() != flat.get_name():
            continue
        boxes, _, rows, columns = up.get_input_shape(0)
        channels = up.get_output_shape(0)[1]
        bias = _constant(biased.input_value(1).get_node()).ravel()
        ones, zeros = [1, 1], [0, 0]
        cells = op.convolution(up.input_value(0), weights, ones, zeros, zeros, ones)
        cells.set_friendly_name(up.get_friendly_name())
        cells = op.relu(op.add(cells, op.constant(np.tile(bias, 4).reshape(1, -1, 1, 1))))
        last = op.transpose(cells, _ints([0, 2, 3, 1]))
        pixels = op.reshape(last, _ints([boxes, rows * columns * 4, channels]), False)
        logits = op.matmul(pixels, product.input_value(0), False, True)
        grid = op.reshape(logits, _ints([boxes, rows, columns, 2, 2]), False)
        grid = op.transpose(grid, _ints([0, 1, 3, 2, 4]))
        _replace(product, op.reshape(grid, _ints([boxes, 1, rows * columns * 4]), False))


def _doubles(up: Node) -> bool:
    attributes = up.get_attributes()
    return (
        list(up.get_input_shape(1)[2:]) == list(attributes["strides"]) == [2, 2]
        and list(attributes["dilations"]) == [1, 1]
        and not any(attributes["pads_begin"])
        and not any(attributes["pads_end"])
        and up.get_output_shape(0)[2] == 2 * up.get_input_shape(0)[2]
    )


def _kernel_as_channels(weights: Node) -> Node | None:
    """Turn ``[C, O, 2, 2]`` into ``[4 * O, C, 1, 1]``; int8 weights stay int8."""

    def turned(values: NDArray[Any]) -> NDArray[Any]:
        kernel = np.broadcast_to(values, (*values.shape[:2], 2, 2)).transpose(2, 3, 1, 0)
        return kernel.reshape(-1, values.shape[0], 1, 1)

    return _stored(weights, turned)


def _stored(weights: Node, turned: Callable[[NDArray[Any]], NDArray[Any]]) -> Node | None:
    """Change the layout of stored weights: int8 with scales, or floats.

    ``turned`` is applied to the scales too, whose axes may have length 1.
    """
    node, scales = weights, None
    if node.get_type_name() == "Multiply":
        scales = node.input_value(1).get_node()
        node = node.input_value(0).get_node()
        if node.get_type_name() == "Subtract":
            if _constant(node.input_value(1).get_node()).any():
                return None
            node = node.input_value(0).get_node()
    stored = node.input_value(0).get_node() if node.get_type_name() == "Convert" else node
    if stored.get_type_name() != "Constant":
        return None
    if scales is not None and _constant(scales).ndim != stored.data.ndim:
        return None
    constant = op.constant(np.ascontiguousarray(turned(stored.data)))
    constant.set_friendly_name(stored.get_friendly_name())
    if stored.get_element_type() != weights.get_element_type():
        constant = op.convert(constant, "f32")
    if scales is None:
        return constant
    return op.multiply(constant, op.constant(np.ascontiguousarray(turned(_constant(scales)))))


def _line(node: Node, kinds: tuple[str, ...]) -> list[Node] | None:
    """Return the nodes that follow, each the only reader of the last, if of these kinds."""
    found: list[Node] = []
    for kind in kinds:
        reader = _only_reader(found[-1] if found else node)
        if reader is None or reader.get_type_name() != kind:
            return None
        found.append(reader)
    return found


def _quantiser(node: Node) -> Node | None:
    """Find the FakeQuantize that quantised a value, through a resizing and Q/DQ nodes."""
    if node.get_type_name() in ("Interpolate", "MaxPool"):
        node = node.input_value(0).get_node()
    for kinds in (("Multiply",), ("Subtract",), ("Convert",), ("Convert",)):
        if node.get_type_name() in kinds:
            node = node.input_value(0).get_node()
    return node if node.get_type_name() == "FakeQuantize" else None


def _dequantised(quantise: Node) -> Node | None:
    """Find the end of a FakeQuantize's Q/DQ nodes; None if there is a zero point."""
    node: Node | None = quantise
    while node is not None and node.get_type_name() != "Multiply":
        node = _only_reader(node)
        if node is None or node.get_type_name() not in ("Convert", "Subtract", "Multiply"):
            return None
        if node.get_type_name() == "Subtract" and _constant(node.input_value(1).get_node()).any():
            return None
    return node


def _bound(quantise: Node) -> float:
    """Return the largest absolute value that a FakeQuantize lets through."""
    limits = [_constant(quantise.input_value(place).get_node()) for place in (1, 2)]
    return float(max(np.abs(limit).max() for limit in limits))


def _is_non_negative(node: Node) -> bool:
    kind = node.get_type_name()
    inputs = (node.input_value(place).get_node() for place in range(node.get_input_size()))
    if kind == "Constant":
        return bool((node.data >= 0).all())
    if kind == "Clamp":
        return bool(node.get_attributes()["min"] >= 0)
    if kind == "MaxPool":
        return _is_non_negative(next(inputs))
    if kind in ("Minimum", "Maximum"):  # relu6 is both
        return (all if kind == "Minimum" else any)(map(_is_non_negative, inputs))
    return bool(kind == "Relu")


def _is_convolution(node: Node) -> bool:
    """Return whether a node is the bias of a convolution and has one reader."""
    return (
        node.get_type_name() == "Add"
        and node.input_value(0).get_node().get_type_name() in ("Convolution", "GroupConvolution")
        and _is_constant(node.input_value(1).get_node())
        and _only_reader(node) is not None
    )


def _is_float_convolution(node: Node, data: Node) -> bool:
    return (
        node.get_type_name() == "Convolution"
        and node.input_value(0).get_node().get_name() == data.get_name()
        and _is_constant(node.input_value(1).get_node())
    )


def _without_factor(node: Node) -> Node:
    """Return the operand of a multiplication by one, as Gemm has it; any other node unchanged."""
    if node.get_type_name() == "Multiply":
        for factor, other in ((0, 1), (1, 0)):
            constant = node.input_value(factor).get_node()
            if constant.get_type_name() == "Constant" and constant.data.tolist() in (1, [1]):
                return node.input_value(other).get_node()
    return node


def _is_constant(node: Node) -> bool:
    """Return whether a node is a constant, possibly reshaped or converted."""
    while node.get_type_name() in ("Convert", "Reshape"):
        node = node.input_value(0).get_node()
    return bool(node.get_type_name() == "Constant")


def _constant(node: Node) -> NDArray[np.float32]:
    """Return a constant's values as float32, in the new shape if it is reshaped."""
    if node.get_type_name() == "Convert":
        return _constant(node.input_value(0).get_node())
    if node.get_type_name() == "Reshape":
        return _constant(node.input_value(0).get_node()).reshape(node.get_output_shape(0))
    values: NDArray[np.float32] = np.asarray(node.data, np.float32)
    return values


def _only_reader(node: Node) -> Node | None:
    readers = _readers(node)
    return readers[0] if len(readers) == 1 else None


def _readers(node: Node) -> list[Node]:
    """Return the nodes that read a node's values, not only their shape."""
    return [reader for reader in _all_readers(node) if reader.get_type_name() != "ShapeOf"]


def _all_readers(node: Node) -> Iterator[Node]:
    for output in node.outputs():
        for port in output.get_target_inputs():
            yield port.get_node()


def _replace(old: Node, new: Node) -> None:
    for port in old.output(0).get_target_inputs():
        port.replace_source_output(new.output(0))


def _ints(values: list[int] | int) -> Node:
    return op.constant(np.asarray(values, np.int64))
