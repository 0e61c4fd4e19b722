"""The passes preserve results, and keep operators that decide on boxes in float32."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, numpy_helper
from parity import draw_people

from maskcast.builder.graph.float16 import compute_in_float16
from maskcast.builder.graph.folding import fold_layers
from maskcast.builder.graph.operators import function_bodies
from maskcast.builder.graph.quantization import restore_float
from maskcast.builder.graph.size import fix_size, fold_shapes
from maskcast.engines.bundle import default_bundle

BLOCK = """
<ir_version: 10, opset_import: ["" : 18, "maskcast" : 1]>
block (float[batch, 3, h, w] images, float[r, 4] rois, int32[r] batch_index)
  => (float[batch, 4, h, w] p2, float[r, 4, 7, 7] pooled, float[batch, 4, h, w] probabilities)
<float16[4, 3, 3, 3] weight, float[4] scale, float[4] bias, float[4] mean, float[4] variance>
{
    wide = Cast <to: int = 1> (weight)
    conv = Conv <pads: ints = [1, 1, 1, 1]> (images, wide)
    normal = BatchNormalization (conv, scale, bias, mean, variance)
    p2 = Relu (normal)
    pooled = maskcast.MultiscaleRoiAlign <output_size: int = 7, sampling_ratio: int = 2,
        aligned: int = 0, plugin_namespace: string = "maskcast", plugin_version: string = "1">
        (p2, p2, p2, p2, rois, batch_index)
    probabilities = Softmax (p2)
}
"""
INPUTS = {
    "images": np.random.default_rng(0).standard_normal((2, 3, 64, 96)).astype("f4"),
    "rois": np.array([[0, 0, 60, 40], [8, 8, 300, 200]], "f4"),
    "batch_index": np.array([0, 1], "i4"),
}


def block():
    rng = np.random.default_rng(0)
    model = onnx.parser.parse_model(BLOCK)
    values = {
        "weight": rng.standard_normal((4, 3, 3, 3)).astype("f2"),
        "scale": rng.uniform(0.5, 2, 4).astype("f4"),
        "bias": rng.standard_normal(4).astype("f4"),
        "mean": rng.standard_normal(4).astype("f4"),
        "variance": np.array([0.1, 0.3, 1, 9], "f4"),
    }
    del model.graph.initializer[:]
    tensors = [numpy_helper.from_array(array, name) for name, array in values.items()]
    model.graph.initializer.extend(tensors)
    model.functions.extend(function_bodies(aligned=False))
    return model


def run(model, inputs):
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, inputs), strict=True))


def operators(model):
    return [node.op_type for node in model.graph.node]


def element_types(model):
    """Element type of every value, by onnx's own inference."""
    inferred = onnx.shape_inference.infer_shapes(model).graph
    known = [*inferred.value_info, *inferred.input, *inferred.output]
    types = {value.name: value.type.tensor_type.elem_type for value in known}
    return types | {tensor.name: tensor.data_type for tensor in inferred.initializer}


def test_convolutions_and_features_become_half_and_softmax_stays():
    model = block()
    fold_layers(model)
    before = run(model, INPUTS)
    compute_in_float16(model)
    after = run(model, INPUTS)
    assert after["p2"].dtype == np.float16
    assert after["pooled"].dtype == np.float32  # not a feature, so its type stays
    types = element_types(model)
    (softmax,) = (node for node in model.graph.node if node.op_type == "Softmax")
    (conv,) = (node for node in model.graph.node if node.op_type == "Conv")
    assert types[softmax.input[0]] == TensorProto.FLOAT
    assert {types[name] for name in conv.input} == {TensorProto.FLOAT16}
    for name in ("p2", "pooled"):
        scale = np.abs(before[name]).max()
        np.testing.assert_allclose(after[name], before[name], atol=2e-3 * scale)
    np.testing.assert_allclose(after["probabilities"], before["probabilities"], atol=0.02)


def test_a_weight_that_half_cannot_hold_keeps_its_convolution_in_float32():
    model = block()
    fold_layers(model)
    (conv,) = (node for node in model.graph.node if node.op_type == "Conv")
    for tensor in model.graph.initializer:
        if tensor.name == conv.input[1]:
            large = numpy_helper.to_array(tensor) * np.float32(1e6)
            tensor.CopyFrom(numpy_helper.from_array(large, tensor.name))
    compute_in_float16(model)
    assert run(model, INPUTS)["p2"].dtype == np.float32


# ---- The default bundle

needs_default = pytest.mark.skipif(
    not (default_bundle() / "detector.onnx").exists(), reason="the default bundle is not built"
)
HEIGHT, WIDTH = 160, 256


def float_detector() -> onnx.ModelProto:
    model = onnx.load(Path(default_bundle()) / "detector.onnx")
    restore_float(model)
    return model


def detector() -> onnx.ModelProto:
    model = float_detector()
    fold_layers(model)
    fix_size(model, HEIGHT, WIDTH)
    fold_shapes(model)
    return model


def random_images(batch=2):
    """Draw images with a photograph of a person, so that there is something to find."""
    drawn = np.stack([draw_people(HEIGHT, WIDTH, seed) for seed in range(batch)])
    images = drawn.transpose(0, 3, 1, 2).astype("f4")
    return {"images": images, "sizes": np.array([[HEIGHT, WIDTH]] * batch, "f4")}


@needs_default
def test_preparing_the_default_detector_changes_nothing_but_rounding():
    before = run(float_detector(), random_images())
    model = detector()
    after = run(model, random_images())
    kept = {"BatchNormalization", "Pad", "NonZero", "Loop", "If"} & set(operators(model))
    assert kept == set()
    np.testing.assert_array_equal(after["counts"], before["counts"])
    for name in ("p2", "p3", "p4", "p5"):
        scale = np.abs(before[name]).max()
        np.testing.assert_allclose(after[name], before[name], atol=1e-4 * scale)
    np.testing.assert_allclose(after["scores"], before["scores"], atol=1e-4)


@needs_default
def test_in_half_every_operator_that_decides_about_boxes_takes_float32():
    model = detector()
    compute_in_float16(model)
    types = element_types(model)
    for node in model.graph.node:
        if node.op_type in (
            "Exp",
            "Softmax",
            "Sigmoid",
            "TopK",
            "GroupedNms",
            "Div",
            "Sub",
            "Gather",
        ):
            given = {types.get(name) for name in node.input if name}
            assert TensorProto.FLOAT16 not in given, (node.op_type, node.name)
        if node.op_type in ("Conv", "Gemm"):
            assert {types[name] for name in node.input} == {TensorProto.FLOAT16}, node.name
        if node.op_type == "MultiscaleRoiAlign":
            assert [types[name] for name in node.input[:5]] == [TensorProto.FLOAT16] * 4 + [
                TensorProto.FLOAT
            ]


@needs_default
def test_the_default_detector_in_half_finds_the_same_as_in_float32():
    before = run(detector(), random_images())
    model = detector()
    compute_in_float16(model)
    after = run(model, random_images())
    for name in ("p2", "p3", "p4", "p5"):
        assert after[name].dtype == np.float16
        scale = np.abs(before[name]).max()
        assert np.abs(after[name] - before[name]).max() < 0.02 * scale
    # Lower scores are slivers at the border, which depend on rounding.
    likely = before["scores"] > 0.4
    assert likely.any()
    np.testing.assert_allclose(after["scores"][likely], before["scores"][likely], atol=0.02)


QUANTISED = """
<ir_version: 8, opset_import: ["" : 18]>
small (float[1, 2, 8, 8] x) => (float[1, 2, 8, 8] y)
<float one = {0.1}, int8 zero = {0}, int8[2, 2, 1, 1] w = {100, -50, 120, 127},
 float[2] scales = {0.01, 1e-10}, int8[2] zeros = {0, 0}>
{
    q = QuantizeLinear (x, one, zero)
    dq = DequantizeLinear (q, one, zero)
    dw = DequantizeLinear <axis: int = 0> (w, scales, zeros)
    conv = Conv (dq, dw)
    y = Relu (conv)
}
"""


def test_what_int8_leaves_becomes_float16():
    model = onnx.parser.parse_model(QUANTISED)
    rng = np.random.default_rng(0)
    x = rng.uniform(-5, 5, (1, 2, 8, 8)).astype("f4")
    wanted = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": x})[0]
    compute_in_float16(model)
    onnx.checker.check_model(model)
    found = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": x})[0]
    np.testing.assert_allclose(found, wanted, rtol=2e-3, atol=2e-3)
    types = {t.name: t.data_type for t in model.graph.initializer}
    conv = next(node for node in model.graph.node if node.op_type == "Conv")
    producers = {name: node for node in model.graph.node for name in node.output}
    for name in conv.input:  # Q/DQ touch the convolution: nothing lies between them
        assert producers[name].op_type == "DequantizeLinear"
        assert types[producers[name].input[1]] == onnx.TensorProto.FLOAT16


def test_a_scale_too_small_for_float16_is_raised_and_its_weights_follow():
    model = onnx.parser.parse_model(QUANTISED)
    compute_in_float16(model)
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    assert stored["w"].ravel().tolist() == [100, -50, 0, 0]
    scales = stored["scales/float16"]
    assert scales.dtype == np.float16
    assert (scales >= np.finfo(np.float16).tiny).all()
