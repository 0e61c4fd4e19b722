"""Rewrites of graphs for OpenVINO: less work, the same results."""

from __future__ import annotations

from typing import Any

import numpy as np
import openvino as ov
import openvino.opset15 as op
import pytest

from maskcast.engines.openvino.fusion import (
    add_in_bytes,
    convolve_rows,
    join_narrow_convolutions,
    multiply_before_upsampling,
    quantise_before_pooling,
    use_unsigned_bytes,
)

CHANNELS, SIDE = 16, 12


def values(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def quantised(node: Any, largest: float) -> Any:
    """Quantise and dequantise as OpenVINO reads both from ONNX: symmetric, 8 bits."""
    step = np.float32(largest / 127)
    low, high = np.float32(-128), np.float32(127)
    levels = op.fake_quantize(node, low * step, high * step, low, high, 256)
    return op.multiply(op.convert(op.convert(levels, "i8"), "f32"), op.constant(step))


def convolved(
    node: Any, inputs: int, outputs: int, side: int = 1, seed: int = 0, int8: bool = True
) -> Any:
    weight = values(outputs, inputs, side, side, seed=seed) / np.float32(np.sqrt(inputs) * side)
    if int8:
        scale = np.abs(weight).max(axis=(1, 2, 3), keepdims=True) / 127
        stored = op.constant(np.rint(weight / scale).astype(np.int8))
        weight = op.multiply(op.convert(stored, "f32"), op.constant(scale))
    around = [side // 2] * 2
    bias = op.constant(values(1, outputs, 1, 1, seed=seed + 1) / 10)
    return op.add(op.convolution(node, weight, [1, 1], around, around, [1, 1]), bias)


def image_input(channels: int = CHANNELS) -> Any:
    return op.parameter([1, channels, SIDE, SIDE], np.float32)


def kinds(model: ov.Model) -> list[str]:
    return [node.get_type_name() for node in model.get_ordered_ops()]


def compiled(model: ov.Model) -> ov.CompiledModel:
    return ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})


def run(model: ov.Model) -> list[Any]:
    inputs = [values(*port.shape, seed=9) for port in model.inputs]
    return list(compiled(model)(inputs).values())


def changed(model: ov.Model, rewrite: Any) -> tuple[list[Any], list[Any]]:
    """Return the results before and after a rewrite, which changes the model itself."""
    before = run(model.clone())
    rewrite(model)
    model.validate_nodes_and_infer_types()
    return before, run(model)


def residual_block() -> ov.Model:
    images = image_input()
    shortcut = quantised(op.relu(convolved(quantised(images, 3), CHANNELS, CHANNELS)), 3)
    branch = quantised(op.relu(convolved(shortcut, CHANNELS, CHANNELS, 3, seed=2)), 3)
    total = op.relu(op.add(convolved(branch, CHANNELS, CHANNELS, seed=4), shortcut))
    last = convolved(quantised(total, 4), CHANNELS, 4, seed=6)
    return ov.Model([op.result(last)], [images], "block")


def test_a_sum_stays_the_same_and_is_computed_by_its_convolution() -> None:
    model = residual_block()
    (before,), (after,) = changed(model, add_in_bytes)
    step = 4 / 127
    assert np.abs(before - after).max() < 2 * step
    assert np.abs(before - after).mean() < 0.05 * step
    (convolution,) = (
        node
        for node in compiled(model).get_runtime_model().get_ordered_ops()
        if any(
            total.get_friendly_name() in node.get_rt_info()["originalLayersNames"].value
            for total in model.get_ordered_ops()
            if total.get_type_name() == "Add" and "FakeQuantize" in kinds_of_inputs(total)
        )
    )
    assert convolution.get_rt_info()["layerType"].value == "Convolution"


def kinds_of_inputs(node: ov.Node) -> list[str]:
    return [port.get_source_output().get_node().get_type_name() for port in node.inputs()]


def test_values_that_are_never_negative_get_half_the_rounding_error() -> None:
    images = image_input()
    exact = op.relu(images)
    model = ov.Model([op.result(quantised(exact, 3)), op.result(exact)], [images], "relu")
    (before, truth), (after, _) = changed(model, use_unsigned_bytes)
    inside = truth < 3
    errors = [np.abs(found - truth)[inside] for found in (before, after)]
    assert errors[1].max() < 0.51 * errors[0].max()
    assert after.max() == pytest.approx(before.max())


def test_relu6_as_onnx_clips_it_counts_as_never_negative() -> None:
    images = image_input()
    clipped = op.minimum(op.maximum(images, np.float32(0)), np.float32(6))
    model = ov.Model([op.result(quantised(clipped, 6))], [images], "relu6")
    use_unsigned_bytes(model)
    (quantise,) = (n for n in model.get_ordered_ops() if n.get_type_name() == "FakeQuantize")
    assert quantise.input_value(1).get_node().data == 0


def test_values_that_may_be_negative_stay_symmetric() -> None:
    model = ov.Model([op.result(quantised(images := image_input(), 3))], [images], "any")
    before = kinds(model)
    use_unsigned_bytes(model)
    assert kinds(model) == before


def pooled(active: bool) -> ov.Model:
    images = image_input()
    source = op.relu(images) if active else images
    pool = op.max_pool(source, [2, 2], [1, 1], [1, 1], [1, 1], [3, 3], index_element_type="i32")
    return ov.Model([op.result(quantised(pool.output(0), 3))], [images], "pool")


def test_pooling_reads_bytes_and_gives_the_same() -> None:
    model = pooled(active=True)
    use_unsigned_bytes(model)
    (before,), (after,) = changed(model, quantise_before_pooling)
    np.testing.assert_array_equal(before, after)
    assert kinds(model).index("FakeQuantize") < kinds(model).index("MaxPool")


def test_pooling_of_signed_values_is_not_moved() -> None:
    model = pooled(active=False)
    quantise_before_pooling(model)
    assert kinds(model).index("MaxPool") < kinds(model).index("FakeQuantize")


def heads(channels: int) -> ov.Model:
    images = image_input()
    shared = op.relu(images)
    results = [
        op.result(convolved(shared, CHANNELS, outputs, seed=outputs, int8=False))
        for outputs in (channels, 4 * channels)
    ]
    return ov.Model(results, [images], "heads")


def test_two_narrow_convolutions_become_one() -> None:
    model = heads(3)
    before, after = changed(model, join_narrow_convolutions)
    for one, other in zip(before, after, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    assert kinds(model).count("Convolution") == 1


def test_wide_convolutions_stay_apart() -> None:
    model = heads(4)
    join_narrow_convolutions(model)
    assert kinds(model).count("Convolution") == 2


def linear(int8: bool) -> ov.Model:
    """Return a product as OpenVINO reads a Gemm with bias from ONNX: with factors of one."""
    rows = op.parameter([20, CHANNELS], np.float32)
    weight, data, one = values(8, CHANNELS), rows, op.constant(np.float32(1))
    if int8:
        scale = np.abs(weight).max(axis=1, keepdims=True) / 127
        stored = op.constant(np.rint(weight / scale).astype(np.int8))
        weight = op.multiply(op.convert(stored, "f32"), op.constant(scale))
        data = quantised(rows, 3)
    bias = op.multiply(one, op.constant(values(8, seed=1)))
    total = op.add(op.multiply(op.matmul(data, weight, False, True), one), bias)
    return ov.Model([op.result(quantised(op.relu(total), 20))], [rows], "linear")


def test_a_product_of_rows_in_int8_is_a_convolution() -> None:
    model = linear(int8=True)
    use_unsigned_bytes(model)
    (before,), (after,) = changed(model, convolve_rows)
    steps = np.abs(before - after) / np.float32(20 / 255)
    assert steps.max() < 1.01  # sums that lie between two steps
    assert steps.mean() < 0.02
    assert "MatMul" not in kinds(model)
    order = [kind for kind in kinds(model) if kind in ("Convolution", "FakeQuantize", "Reshape")]
    assert order[-3:] == ["Convolution", "FakeQuantize", "Reshape"]


def test_a_product_of_floats_stays_one() -> None:
    model = linear(int8=False)
    convolve_rows(model)
    assert "MatMul" in kinds(model)


def mask_predictor(int8: bool) -> ov.Model:
    pooled, rows = (
        op.parameter([3, CHANNELS, 5, 6], np.float32),
        op.parameter([3, 1, 8], np.float32),
    )
    weight = values(CHANNELS, 8, 2, 2)
    data = pooled
    if int8:
        scale = np.abs(weight).max(axis=(0, 2, 3), keepdims=True) / 127
        stored = op.constant(np.rint(weight / scale).astype(np.int8))
        weight = op.multiply(op.convert(stored, "f32"), op.constant(scale))
        data = quantised(pooled, 3)
    up = op.convolution_backprop_data(data, weight, [2, 2])
    active = op.relu(op.add(up, op.constant(values(1, 8, 1, 1, seed=1))))
    flat = op.reshape(active, op.constant(np.array([3, 8, 120])), False)
    return ov.Model([op.result(op.matmul(rows, flat, False, False))], [pooled, rows], "masks")


@pytest.mark.parametrize("int8", [False, True])
def test_mask_pixels_are_put_in_order_after_their_product(int8: bool) -> None:
    model = mask_predictor(int8)
    (before,), (after,) = changed(model, multiply_before_upsampling)
    np.testing.assert_allclose(before, after, rtol=1e-4, atol=1e-4)
    assert "ConvolutionBackpropData" not in kinds(model)
    stored = {
        str(node.get_element_type())
        for node in model.get_ordered_ops()
        if node.get_type_name() == "Constant" and list(node.get_output_shape(0)) == [32, 16, 1, 1]
    }
    assert stored == {"<Type: 'int8_t'>" if int8 else "<Type: 'float32'>"}
