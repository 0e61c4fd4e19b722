"""Quantised graphs give nearly the same results, and have int8 where they should."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, numpy_helper

from maskcast.builder.graph.quantization import dequantise, quantise
from maskcast.engines.errors import InputError

HEAD = """
<ir_version: 10, opset_import: ["" : 18]>
head (float[batch, 3, 32, 32] images) => (float[batch, 8, 16, 16] p2, float[batch, 2] logits)
<float[8, 3, 3, 3] first, float[8, 8, 3, 3] second, float[16, 512] third, float[2, 16] last>
{
    a = Conv <pads: ints = [1, 1, 1, 1]> (images, first)
    b = Relu (a)
    c = MaxPool <kernel_shape: ints = [2, 2], strides: ints = [2, 2]> (b)
    p2 = Conv <pads: ints = [1, 1, 1, 1]> (c, second)
    d = MaxPool <kernel_shape: ints = [2, 2], strides: ints = [2, 2]> (p2)
    e = Flatten (d)
    f = Gemm <transB: int = 1> (e, third)
    g = Relu (f)
    logits = Gemm <transB: int = 1> (g, last)
}
"""


def head():
    rng = np.random.default_rng(0)
    model = onnx.parser.parse_model(HEAD)
    shapes = {"first": (8, 3, 3, 3), "second": (8, 8, 3, 3), "third": (16, 512), "last": (2, 16)}
    del model.graph.initializer[:]
    for name, shape in shapes.items():
        values = rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))
        model.graph.initializer.append(numpy_helper.from_array(values.astype("f4"), name))
    return model


def sample(seed):
    rng = np.random.default_rng(seed)
    return {"images": rng.uniform(-2, 2, (2, 3, 32, 32)).astype("f4")}


def run(model, inputs):
    session = onnxruntime.InferenceSession(model.SerializeToString())
    return session.run(["p2", "logits"], inputs)


def producers(model):
    return {name: node for node in model.graph.node for name in node.output}


def test_results_stay_within_a_few_percent():
    model = head()
    before = run(model, sample(99))
    quantise(model, [sample(i) for i in range(4)])
    for one, other in zip(run(model, sample(99)), before, strict=True):
        assert np.abs(one - other).mean() < 0.02 * np.abs(other).max()
        assert not np.array_equal(one, other)


def test_all_but_the_last_layer_read_int8():
    model = head()
    quantise(model, [sample(0)])
    made_by = producers(model)
    layers = [node for node in model.graph.node if node.op_type in ("Conv", "Gemm")]
    kinds = [[made_by[name].op_type if name in made_by else "constant" for name in node.input[:2]]
             for node in layers]  # fmt: skip
    assert kinds == [["DequantizeLinear"] * 2] * 3 + [["Relu", "constant"]]


def test_weights_are_stored_as_int8_with_a_scale_for_each_output_channel():
    model = head()
    quantise(model, [sample(0)])
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    assert stored["second/int8"].data_type == TensorProto.INT8
    assert list(stored["second/scale"].dims) == [8]
    assert "second" not in stored
    weight = numpy_helper.to_array(stored["second/int8"])
    assert np.abs(weight).reshape(8, -1).max(axis=1).tolist() == [127] * 8


def test_a_rare_peak_does_not_widen_the_range():
    model, calm = head(), head()
    peak = sample(0)
    peak["images"] = np.tile(peak["images"], (40, 1, 1, 1))
    quantise(calm, [peak])
    peak = {"images": peak["images"].copy()}
    peak["images"][0, 0, 0, 0] = 1e6
    quantise(model, [peak])
    scales = [
        {t.name: float(numpy_helper.to_array(t).max()) for t in m.graph.initializer}["images/scale"]
        for m in (model, calm)
    ]
    assert scales[0] == pytest.approx(scales[1], rel=0.01)


def test_without_images_the_error_says_so():
    with pytest.raises(InputError, match="no image to find"):
        quantise(head(), [])


BLOCK = """
<ir_version: 10, opset_import: ["" : 18]>
block (float[batch, 8, 16, 16] images) => (float[batch, 8, 16, 16] p2)
<float[8, 8, 1, 1] branch, float[8, 8, 1, 1] shortcut, float[8, 8, 3, 3] last>
{
    a = Conv (images, branch)
    b = Conv (images, shortcut)
    c = Add (a, b)
    d = Relu (c)
    p2 = Conv <pads: ints = [1, 1, 1, 1]> (d, last)
}
"""


def block():
    rng = np.random.default_rng(0)
    model = onnx.parser.parse_model(BLOCK)
    del model.graph.initializer[:]
    for name, side in {"branch": 1, "shortcut": 1, "last": 3}.items():
        values = rng.standard_normal((8, 8, side, side)).astype("f4")
        model.graph.initializer.append(numpy_helper.from_array(values, name))
    return model, {"images": rng.uniform(-2, 2, (2, 8, 16, 16)).astype("f4")}


def test_a_sum_of_two_convolutions_takes_the_shortcut_in_int8():
    model, inputs = block()
    before = onnxruntime.InferenceSession(model.SerializeToString()).run(None, inputs)[0]
    quantise(model, [inputs])
    onnx.checker.check_model(model)
    (total,) = (node for node in model.graph.node if node.op_type == "Add")
    assert [producers(model)[name].op_type for name in total.input] == ["Conv", "DequantizeLinear"]
    after = onnxruntime.InferenceSession(model.SerializeToString()).run(None, inputs)[0]
    assert 0 < np.abs(after - before).mean() < 0.02 * np.abs(before).max()


def test_a_shortcut_that_another_layer_reads_is_quantised_once():
    model, inputs = block()
    for node in model.graph.node:
        if node.output[0] == "a":
            node.input[0] = "b"
    branch, shortcut, *others = list(model.graph.node)
    ordered = [
        onnx.NodeProto.FromString(n.SerializeToString()) for n in (shortcut, branch, *others)
    ]
    del model.graph.node[:]
    model.graph.node.extend(ordered)
    quantise(model, [inputs])
    onnx.checker.check_model(model)
    (total,) = (node for node in model.graph.node if node.op_type == "Add")
    assert [producers(model)[name].op_type for name in total.input] == ["Conv", "DequantizeLinear"]
    names = [tensor.name for tensor in model.graph.initializer]
    assert len(names) == len(set(names))


MASKS = """
<ir_version: 10, opset_import: ["" : 18]>
masks (float[r, 4, 14, 14] pooled, float[r, 1, 8] rows) => (float[r, 1, 784] logits)
<float[4, 8, 2, 2] up, int64[3] flat = {0, 8, -1}>
{
    a = ConvTranspose <strides: ints = [2, 2]> (pooled, up)
    b = Relu (a)
    c = Reshape (b, flat)
    logits = MatMul (rows, c)
}
"""


def masks():
    rng = np.random.default_rng(0)
    model = onnx.parser.parse_model(MASKS)
    kept = [tensor for tensor in model.graph.initializer if tensor.name != "up"]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    up = rng.standard_normal((4, 8, 2, 2)) * np.arange(1, 9)[:, None, None]
    model.graph.initializer.append(numpy_helper.from_array(up.astype("f4"), "up"))
    inputs = {"pooled": rng.uniform(-2, 2, (3, 4, 14, 14)), "rows": rng.uniform(-1, 1, (3, 1, 8))}
    return model, {name: values.astype("f4") for name, values in inputs.items()}


def test_an_upsampling_convolution_has_a_scale_for_each_output_channel():
    model, inputs = masks()
    before = onnxruntime.InferenceSession(model.SerializeToString()).run(None, inputs)[0]
    quantise(model, [inputs])
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    assert stored["up/scale"].shape == (8,)
    assert np.abs(stored["up/int8"]).max(axis=(0, 2, 3)).tolist() == [127] * 8
    after = onnxruntime.InferenceSession(model.SerializeToString()).run(None, inputs)[0]
    assert 0 < np.abs(after - before).max() < 0.03 * np.abs(before).max()


@pytest.mark.parametrize("make", [lambda: masks()[0], head, lambda: block()[0]])
def test_taking_the_quantisation_out_leaves_the_graph_and_weights_within_half_a_step(make):
    model, original = make(), make()
    inputs = {"masks": masks()[1], "block": block()[1]}
    quantise(model, [inputs.get(model.graph.name, sample(0))])
    dequantise(model)
    assert [n.op_type for n in model.graph.node] == [n.op_type for n in original.graph.node]
    assert [list(n.input) for n in model.graph.node] == [list(n.input) for n in original.graph.node]
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    for tensor in original.graph.initializer:
        values = numpy_helper.to_array(tensor)
        step = np.abs(values).max() / 127
        np.testing.assert_allclose(stored[tensor.name], values, atol=0.51 * step)
