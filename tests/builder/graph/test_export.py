from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from maskcast.builder.graph.float16 import store_float16
from maskcast.engines.bundle import Bundle


@pytest.fixture(scope="module")
def graphs(calibrated_bundle: Bundle) -> dict[str, ModelProto]:
    assert calibrated_bundle.segmenter is not None
    return {
        "detector": onnx.load(calibrated_bundle.detector),
        "segmenter": onnx.load(calibrated_bundle.segmenter),
    }


@pytest.mark.parametrize("role", ["detector", "segmenter"])
def test_a_graph_is_valid_onnx(graphs: dict[str, ModelProto], role: str) -> None:
    onnx.checker.check_model(graphs[role], full_check=True)


def test_batch_size_and_number_of_boxes_are_free(graphs: dict[str, ModelProto]) -> None:
    def shapes(role: str) -> dict[str, list[str | int]]:
        ports = [*graphs[role].graph.input, *graphs[role].graph.output]
        return {
            port.name: [
                side.dim_param or side.dim_value for side in port.type.tensor_type.shape.dim
            ]
            for port in ports
        }

    detector, segmenter = shapes("detector"), shapes("segmenter")
    assert detector["images"] == ["batch", 3, "32*h", "32*w"]
    assert detector["sizes"] == ["batch", 2]
    assert detector["boxes"] == ["batch", 100, 4]
    assert detector["p2"] == segmenter["p2"] == ["batch", 256, "8*h", "8*w"]
    assert segmenter["boxes"] == ["r", 4]
    assert segmenter["masks"] == ["r", 28, 28]


def test_the_poser_takes_what_the_segmenter_takes_except_labels(
    graphs: dict[str, ModelProto], keypoint_bundle: Bundle
) -> None:
    assert keypoint_bundle.poser is not None
    poser = onnx.load(keypoint_bundle.poser)
    onnx.checker.check_model(poser, full_check=True)

    def ports(values: Iterable[onnx.ValueInfoProto]) -> dict[str, tuple[int, list[str | int]]]:
        kinds = {value.name: value.type.tensor_type for value in values}
        return {
            name: (kind.elem_type, [side.dim_param or side.dim_value for side in kind.shape.dim])
            for name, kind in kinds.items()
        }

    wanted = ports(graphs["segmenter"].graph.input)
    del wanted["labels"]
    assert ports(poser.graph.input) == wanted
    assert ports(poser.graph.output) == {"heatmaps": (TensorProto.FLOAT, ["r", 17, 56, 56])}
    assert [node.op_type for node in poser.graph.node if node.domain] == ["MultiscaleRoiAlign"]


def test_nodes_of_the_own_domain_name_their_tensorrt_plugins(graphs: dict[str, ModelProto]) -> None:
    own = [node for graph in graphs.values() for node in graph.graph.node if node.domain]
    assert sorted(node.op_type for node in own) == [
        *["GroupedNms"] * 2,
        *["MultiscaleRoiAlign"] * 2,
    ]
    for node in own:
        attributes = {item.name: helper.get_attribute_value(item) for item in node.attribute}
        assert node.domain == "maskcast"
        assert attributes["plugin_namespace"] == b"maskcast"
        assert attributes["plugin_version"] == b"1"


def test_function_bodies_come_with_the_graph(graphs: dict[str, ModelProto]) -> None:
    for graph in graphs.values():
        assert {(f.domain, f.name) for f in graph.functions} == {
            ("maskcast", "PoolLevel"),
            ("maskcast", "MultiscaleRoiAlign"),
            ("maskcast", "GroupedNms"),
        }


def test_no_trace_of_the_machine_is_left(graphs: dict[str, ModelProto]) -> None:
    here = str(Path(__file__).parents[3]).encode()
    for graph in graphs.values():
        assert here not in graph.SerializeToString()


def test_halved_weights_are_cast_where_they_are_used() -> None:
    kernel = np.array([[1.0, 2.5], [1e-3, -4.0]], np.float32)
    weights = {
        "roi_heads.kernel": kernel,
        "roi_heads.vast": np.array([[1e6, 1.0]], np.float32),
        "roi_heads.bias": np.array([0.1, 0.2], np.float32),
    }
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "roi_heads.kernel"], ["y"]),
            helper.make_node("Add", ["y", "roi_heads.bias"], ["z"]),
            helper.make_node("Add", ["z", "roi_heads.vast"], ["out"]),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 2])],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, [1, 2])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    store_float16(model)
    onnx.checker.check_model(model, full_check=True)
    stored = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    assert stored["roi_heads.kernel"] == TensorProto.FLOAT16
    assert stored["roi_heads.bias"] == TensorProto.FLOAT
    assert stored["roi_heads.vast"] == TensorProto.FLOAT  # 1e6 is more than float16 can hold
