"""Folding changes the nodes of a graph, but not its results."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torchvision.ops.misc import FrozenBatchNorm2d

from maskcast.builder.graph.export import _simplify
from maskcast.builder.graph.float16 import store_float16, widen_weights
from maskcast.builder.graph.folding import (
    fold_batch_norms,
    fold_frozen_norms,
    fold_layers,
    fold_pads,
)

BLOCK = """
<ir_version: 10, opset_import: ["" : 18]>
block (float[batch, 3, h, w] images) => (float[batch, 4, h, w] features)
<float16[4, 3, 3, 3] conv_weight, float[4] scale, float[4] norm_bias, float[4] mean,
 float[4] variance>
{
    wide = Cast <to: int = 1> (conv_weight)
    conv = Conv <pads: ints = [1, 1, 1, 1]> (images, wide)
    normal = BatchNormalization (conv, scale, norm_bias, mean, variance)
    features = Relu (normal)
}
"""
PADDED = """
<ir_version: 10, opset_import: ["" : 18]>
padded (float[1, 3, 20, 30] images) => (float[1, 4, h, w] features)
<float[4, 3, 3, 3] weight, int64[8] amounts = {0, 0, 1, 0, 0, 0, 2, 1}>
{
    larger = Pad (images, amounts)
    features = Conv <pads: ints = [0, 1, 0, 0], strides: ints = [2, 2]> (larger, weight)
}
"""
IMAGES = {"images": np.random.default_rng(0).standard_normal((1, 3, 20, 30)).astype("f4")}


def model_of(text, **values):
    model = onnx.parser.parse_model(text)
    kept = [tensor for tensor in model.graph.initializer if tensor.name not in values]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    model.graph.initializer.extend(numpy_helper.from_array(v, k) for k, v in values.items())
    return model


def block(smallest_variance=0.1):
    rng = np.random.default_rng(0)
    values = {
        "conv_weight": rng.standard_normal((4, 3, 3, 3)).astype("f2"),
        "scale": rng.uniform(0.5, 2, 4).astype("f4"),
        "norm_bias": rng.standard_normal(4).astype("f4"),
        "mean": rng.standard_normal(4).astype("f4"),
        "variance": np.array([smallest_variance, 0.3, 1, 9], "f4"),
    }
    return model_of(BLOCK, **values)


def run(model):
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    return session.run(["features"], IMAGES)[0]


def operators(model):
    return [node.op_type for node in model.graph.node]


def stored(model):
    return {tensor.name: tensor for tensor in model.graph.initializer}


def test_weights_stored_in_half_become_float32_under_their_own_names():
    model = block()
    before = run(model)
    widen_weights(model)
    assert "Cast" not in operators(model)
    assert stored(model)["conv_weight"].data_type == TensorProto.FLOAT
    np.testing.assert_array_equal(run(model), before)


def test_halving_weights_and_widening_them_again_leaves_the_graph_as_it_was():
    model = block()
    widen_weights(model)
    again = onnx.ModelProto.FromString(model.SerializeToString())
    store_float16(again)
    assert stored(again)["conv_weight"].data_type == TensorProto.FLOAT16
    widen_weights(again)
    assert operators(again) == operators(model)
    np.testing.assert_array_equal(run(again), run(model))


def test_batch_norms_fold_into_their_convolutions():
    model = block(smallest_variance=1e-9)  # which float16 could not hold
    before = run(model)
    widen_weights(model)
    fold_batch_norms(model)
    assert operators(model) == ["Conv", "Relu"]
    assert stored(model).keys() == {"conv_weight", "norm_bias"}
    np.testing.assert_allclose(run(model), before, rtol=1e-4, atol=1e-3)


def test_a_batch_norm_of_a_value_that_others_use_stays():
    model = block()
    widen_weights(model)
    model.graph.node.append(helper.make_node("Relu", ["conv"], ["other"]))
    fold_batch_norms(model)
    assert "BatchNormalization" in operators(model)


def padded(**values):
    weight = np.random.default_rng(1).standard_normal((4, 3, 3, 3)).astype("f4")
    return model_of(PADDED, weight=weight, **values)


def test_zeros_around_an_image_become_the_convolutions_own():
    model = padded()
    before = run(model)
    fold_pads(model)
    assert operators(model) == ["Conv"]
    np.testing.assert_array_equal(run(model), before)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"amounts": np.array([0, 0, -1, 0, 0, 0, 2, 1])}, id="cut off"),
        pytest.param({"value": np.array(7, "f4")}, id="sevens"),
        pytest.param({"mode": "reflect"}, id="reflected"),
    ],
)
def test_other_padding_stays(change):
    model = padded(**{k: v for k, v in change.items() if k != "mode"})
    (pad, _) = model.graph.node
    if "value" in change:
        pad.input.append("value")
    if "mode" in change:
        pad.attribute.append(helper.make_attribute("mode", change["mode"]))
    before = run(model)
    fold_pads(model)
    assert operators(model) == ["Pad", "Conv"]
    np.testing.assert_array_equal(run(model), before)


def test_padding_that_others_read_too_stays():
    model = padded()
    model.graph.node.append(helper.make_node("Relu", ["larger"], ["other"]))
    fold_pads(model)
    assert operators(model) == ["Pad", "Conv", "Relu"]


class Frozen(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.norm = FrozenBatchNorm2d(4)
        for buffer in self.norm.buffers():
            buffer.uniform_(0.5, 2)

    def forward(self, images):
        return torch.relu(self.norm(self.conv(images)))


def test_frozen_norms_fold_into_their_convolutions():
    torch.manual_seed(0)
    network = Frozen().eval()
    images = torch.from_numpy(IMAGES["images"])
    program = torch.onnx.export(
        network, (images,), input_names=["images"], output_names=["features"],
        dynamo=True, optimize=False, verbose=False, opset_version=18,
    )  # fmt: skip
    assert program is not None
    _simplify(program.model, keep=set(network.state_dict()))  # as every export of ours is
    model = program.model_proto
    fold_frozen_norms(model)
    assert operators(model) == ["Conv", "Relu"]
    assert stored(model).keys() == {"conv.weight", "norm.bias"}
    np.testing.assert_allclose(run(model), network(images).detach(), rtol=1e-4, atol=1e-5)


def test_everything_folds_at_once():
    model = block()
    before = run(model)
    fold_layers(model)
    assert operators(model) == ["Conv", "Relu"]
    np.testing.assert_allclose(run(model), before, rtol=1e-4, atol=1e-4)


def test_folding_many_convolutions_does_not_copy_the_other_weights_each_time():
    """protobuf keeps what is removed from a model: folding a ResNet-50 once took 9 GB."""
    script = """
import resource, numpy as np, onnx
from onnx import helper, numpy_helper, TensorProto
from maskcast.builder.graph.folding import fold_batch_norms
nodes, tensors = [], [numpy_helper.from_array(np.zeros((64, 64, 64, 64), "f4"), "large")]
nodes.append(helper.make_node("Mul", ["large", "large"], ["unused"]))
value = "x"
for i in range(40):
    tensors.append(numpy_helper.from_array(np.ones((4, 4, 1, 1), "f4"), f"w{i}"))
    nodes.append(helper.make_node("Conv", [value, f"w{i}"], [f"c{i}"]))
    names = [f"n{i}.{k}" for k in range(4)]
    tensors += [numpy_helper.from_array(np.ones(4, "f4"), name) for name in names]
    nodes.append(helper.make_node("BatchNormalization", [f"c{i}", *names], [f"y{i}"]))
    value = f"y{i}"
ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in ("x", value, "unused")]
model = helper.make_model(helper.make_graph(nodes, "g", ends[:1], ends[1:], tensors))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
fold_batch_norms(model)
assert not any(node.op_type == "BatchNormalization" for node in model.graph.node)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 600  # megabytes; 64 of them are the large weight
