"""Graphs compiled for the CPU: whole, or in parts of different precision."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import openvino as ov
import openvino.opset15 as op
from openvino import Model, Node
from openvino.passes import ConstantFolding, Manager
from openvino.preprocess import PrePostProcessor

from maskcast.engines.openvino.fusion import convolve_rows, fuse, multiply_before_upsampling
from maskcast.engines.openvino.operators import is_pooled, mark_pooled

_FP32 = "f32"
_BF16 = "bf16"
# Operators between a pooled region and the product that reads it, or before its weights.
_ELEMENTWISE = {"Reshape", "FakeQuantize", "Convert", "Subtract", "Multiply"}

FEATURES = "features"
"""Output of the detector and input of segmenter and poser: cells of all levels, ``[cells, C]``."""
_STRIDES = {"p2": 4, "p3": 8, "p4": 16, "p5": 32}


def levels(size: tuple[int, int]) -> dict[str, tuple[int, int]]:
    """Return rows and columns of each level, in the order of their cells in ``FEATURES``."""
    height, width = size
    return {name: (height // stride, width // stride) for name, stride in _STRIDES.items()}


def fix_detector(model: Model, size: tuple[int, int]) -> Model:
    """Copy a detector for one image of a size, given as RGB bytes ``[1, H, W, 3]``.

    Features are returned as the table of cells that regions are pooled from, with channels last, as
    in the output of oneDNN's convolutions.
    """
    model = model.clone()
    model.reshape({"images": [1, 3, *size], "sizes": [1, 2]})
    fuse(model)
    _flatten_channels_last(model)
    convolve_rows(model)
    tables = []
    for name in _STRIDES:
        level = model.output(name)
        model.remove_result(level.get_node())
        planar = level.get_node().input_value(0)
        planar.set_names(set())
        last = op.transpose(planar, op.constant(np.array([0, 2, 3, 1])))
        channels = planar.get_partial_shape()[1].get_length()
        tables.append(op.reshape(last, op.constant(np.array([-1, channels])), False))
    table = op.concat(tables, 0)
    table.output(0).set_names({FEATURES})
    _pool_from(model, table)
    model.add_results([op.result(table)])
    steps = PrePostProcessor(model)
    images = steps.input("images")
    images.tensor().set_element_type(ov.Type.u8).set_layout(ov.Layout("NHWC"))
    images.model().set_layout(ov.Layout("NCHW"))
    return steps.build()


def _pool_from(model: Model, table: Node) -> None:
    """Make the pooling read the cells of all levels from one table instead of copying them."""
    for node in model.get_ordered_ops():
        if node.get_type_name() == "EmbeddingBagPackedSum":
            node.input(0).replace_source_output(table.output(0))


def _flatten_channels_last(model: Model) -> None:
    """Let the box head read pooled regions with channels last, as the pooling writes them.

    Its first product takes a region's values in one row, channel by channel. Reordering the weights
    once, cell by cell, avoids transposing all regions of every image.
    """
    for pooled in filter(is_pooled, model.get_ordered_ops()):
        (first, *others) = _consumers(pooled)
        product = first
        while product.get_type_name() in _ELEMENTWISE and not others:
            (product, *others) = _consumers(product)
        if pooled.get_type_name() != "Transpose" or product.get_type_name() != "MatMul" or others:
            continue
        weight = product.input_value(1).get_node()
        while weight.get_type_name() in _ELEMENTWISE:
            weight = weight.input_value(0).get_node()
        _, channels, rows, columns = pooled.get_output_shape(0)
        if weight.get_type_name() != "Constant" or not product.get_attributes()["transpose_b"]:
            continue
        by_channel = weight.data.reshape(-1, channels, rows, columns)
        by_cell = op.constant(by_channel.transpose(0, 2, 3, 1).reshape(weight.data.shape))
        by_cell.set_friendly_name(weight.get_friendly_name())
        for port in weight.output(0).get_target_inputs():
            port.replace_source_output(by_cell.output(0))
        cells = pooled.input_value(0)
        mark_pooled(cells.get_node())
        first.input(0).replace_source_output(cells)


def fix_box_graph(model: Model, size: tuple[int, int], boxes: int) -> Model:
    """Copy a segmenter or poser for the features of ``fix_detector`` and a number of boxes."""
    model = model.clone()
    grids = levels(size)
    counts = [rows * columns for rows, columns in grids.values()]
    channels = model.input("p2").get_partial_shape()[1].get_length()
    table = op.parameter([sum(counts), channels], ov.Type.f32)
    table.output(0).set_names({FEATURES})
    parts = op.variadic_split(table, op.constant(0), op.constant(np.array(counts)))
    for part, (name, grid) in zip(parts.outputs(), grids.items(), strict=True):
        parameter = model.input(name).get_node()
        last = op.reshape(part, op.constant(np.array([1, *grid, channels])), False)
        planar = op.transpose(last, op.constant(np.array([0, 3, 1, 2])))
        for port in parameter.output(0).get_target_inputs():
            port.replace_source_output(planar.output(0))
        model.remove_parameter(parameter)
    _pool_from(model, table)
    model.add_parameters([table])
    shapes = {"boxes": [boxes, 4], "labels": [boxes], "batch_index": [boxes]}
    given = {port.any_name for port in model.inputs}
    model.reshape({name: shape for name, shape in shapes.items() if name in given})
    fuse(model)
    multiply_before_upsampling(model)
    return model


Parts = Sequence[tuple[Model, str]]
"""A model, or the parts of one in order of computation, each with its precision."""


def split(model: Model, precision: str) -> Parts:
    """Cut a model into the parts that compute in different precision.

    For bf16 the model is cut, because OpenVINO computes everything before the last matrix product
    in the requested precision, coordinates too: with the 8 bits of a bfloat16, a box at x = 500
    moves by up to 2 pixels. The part from the outputs of the first convolutions to the pooled
    regions computes in fp32, the parts before and after it in bf16.

    Args:
        model: modified in place.
        precision: "f32" or "bf16".
    """
    return [(model, _FP32)] if precision == _FP32 else _cut(model)


Exported = Sequence[tuple[str, memoryview]]
"""The parts of a compiled graph as OpenVINO exported them, each with its precision."""


class Graph:
    """A compiled graph, whose parts pass tensors on without copies.

    Args:
        parts: each with its precision, in order of computation.
        content: the memory that the parts were loaded from, which they may keep reading.
    """

    def __init__(
        self,
        parts: Sequence[tuple[ov.CompiledModel, str]],
        content: Sequence[ov.Tensor] = (),
    ) -> None:
        self._parts = parts
        self._content = content

    @classmethod
    def compile(cls, core: ov.Core, parts: Parts, threads: int | None = None) -> Graph:
        """Compile a graph.

        Args:
            core: of OpenVINO.
            parts: from ``split``.
            threads: that compute one inference; None for as many as there are cores.
        """
        return cls(
            [
                (core.compile_model(part, "CPU", _options(kind, threads)), kind)
                for part, kind in parts
            ]
        )

    @classmethod
    def load(cls, core: ov.Core, exported: Exported, threads: int | None = None) -> Graph:
        """Load what ``export`` returned for a graph that was compiled for as many threads.

        The graph refers to that memory, because OpenVINO would copy weights given as bytes.

        Raises:
            RuntimeError: OpenVINO cannot read it.
        """
        content = [
            ov.Tensor(np.frombuffer(data, np.uint8), shared_memory=True) for _, data in exported
        ]
        parts = [
            (core.import_model(tensor, "CPU", _options(kind, threads)), kind)
            for tensor, (kind, _) in zip(content, exported, strict=True)
        ]
        return cls(parts, content)

    def export(self) -> Exported:
        """Return the compiled graph as bytes, for the same version of OpenVINO and the same CPU."""
        exported = []
        for part, kind in self._parts:
            content = io.BytesIO()
            part.export_model(content)
            exported.append((kind, content.getbuffer()))
        return exported

    @property
    def features_shape(self) -> list[int]:
        """Of a detector: cells and channels of the features that it computes."""
        ports = (port for part, _ in self._parts for port in part.outputs)
        return list(next(port for port in ports if FEATURES in port.names).shape)

    def request(self) -> Request:
        """Make a request: it owns the memory of its inputs and outputs."""
        return Request([part for part, _ in self._parts])


def _options(precision: str, threads: int | None) -> dict[str, Any]:
    options: dict[str, Any] = {"INFERENCE_PRECISION_HINT": precision}
    if threads is None:
        return options | {"PERFORMANCE_HINT": "LATENCY"}
    # Not pinned: every compiled graph would be pinned to the same first cores.
    return options | {
        "NUM_STREAMS": 1,
        "INFERENCE_NUM_THREADS": threads,
        "ENABLE_CPU_PINNING": False,
    }


class Request:
    """Runs a graph, one inference at a time, with its inputs and outputs by name."""

    def __init__(self, parts: list[ov.CompiledModel]) -> None:
        self._runs = [part.create_infer_request() for part in parts]
        self._inputs: dict[str, list[ov.InferRequest]] = {}
        self._handed: list[tuple[str, ov.InferRequest, ov.InferRequest]] = []
        self._outputs: dict[str, ov.InferRequest] = {}
        for part, run in zip(parts, self._runs, strict=True):
            for port in part.inputs:
                name = port.any_name
                if name in self._outputs:
                    self._handed.append((name, self._outputs[name], run))
                else:
                    self._inputs.setdefault(name, []).append(run)
            self._outputs |= {name: run for port in part.outputs for name in port.names}

    def set_input(self, name: str, tensor: ov.Tensor) -> None:
        """Set an input; the tensor's memory is used, not copied."""
        for run in self._inputs[name]:
            run.set_tensor(name, tensor)

    def output(self, name: str) -> ov.Tensor:
        """Return an output; its memory is overwritten when the request runs again."""
        return self._outputs[name].get_tensor(name)

    def set_output(self, name: str, tensor: ov.Tensor) -> None:
        """Set where an output is written; the tensor's memory is used, not copied."""
        self._outputs[name].set_tensor(name, tensor)

    def infer(self) -> None:
        """Run the graph; releases the GIL."""
        for run in self._runs:
            for name, before, after in self._handed:
                if after is run:
                    run.set_tensor(name, before.get_tensor(name))
            run.infer(share_outputs=True)  # it returns them all, otherwise as copies


def _cut(model: Model) -> list[tuple[Model, str]]:
    """Cut a graph into trunk (bf16), regions (fp32) and heads (bf16); there may be no trunk."""
    # Fold the arithmetic on shapes first: cut in two, it would make shapes unknown.
    passes = Manager()
    passes.register_pass(ConstantFolding())
    passes.run_passes(model)
    nodes = model.get_ordered_ops()
    pooled = next(node for node in nodes if is_pooled(node))
    heads = _closure([pooled], _consumers) - {_key(pooled)}
    convolutions = [
        node for node in nodes if "Convolution" in node.get_type_name() and _key(node) not in heads
    ]
    trunk = _closure(convolutions, _producers)
    for node in nodes:  # convolutions keep channels last, so that a transposition is free there
        if node.get_type_name() in ("Transpose", "Reshape", "Concat", "Result"):
            before = [one for one in _producers(node) if one.get_type_name() != "Constant"]
            if before and all(_key(one) in trunk for one in before):
                trunk.add(_key(node))

    def part_of(node: Node) -> int:
        return 0 if _key(node) in trunk else 2 if _key(node) in heads else 1

    inputs: list[dict[str, Node]] = [{}, {}, {}]
    results: list[list[Node]] = [[], [], []]
    for node in nodes:
        here = part_of(node)
        if node.get_type_name() == "Result":
            results[here].append(node)
        if node.get_type_name() in ("Parameter", "Constant"):
            continue
        for port in node.inputs():
            source = port.get_source_output()
            producer = source.get_node()
            if producer.get_type_name() == "Constant":
                continue
            is_input = producer.get_type_name() == "Parameter"
            if not is_input and part_of(producer) == here:
                continue
            is_known = is_input or any(
                reader.get_node().get_type_name() == "Result"
                for reader in source.get_target_inputs()
            )
            name = source.any_name if is_known else f"{producer.get_name()}:{source.get_index()}"
            if name not in inputs[here]:
                parameter = op.parameter(source.get_partial_shape(), source.get_element_type())
                parameter.output(0).set_names({name})
                inputs[here][name] = parameter
                if not is_known and not any(name in cut for cut in inputs[:here]):
                    names = source.get_names()
                    source.set_names(names | {name})
                    results[part_of(producer)].append(op.result(source))
            port.replace_source_output(inputs[here][name].output(0))
    kinds = (_BF16, _FP32, _BF16)
    return [
        (Model(results[part], list(inputs[part].values()), kinds[part]), kinds[part])
        for part in range(3)
        if results[part]
    ]


def _closure(start: Iterable[Node], neighbours: Any) -> set[str]:
    """Return the names of all nodes that can be reached from these, themselves included."""
    found: set[str] = set()
    waiting = list(start)
    while waiting:
        node = waiting.pop()
        if _key(node) not in found:
            found.add(_key(node))
            waiting += neighbours(node)
    return found


def _consumers(node: Node) -> list[Node]:
    return [port.get_node() for output in node.outputs() for port in output.get_target_inputs()]


def _producers(node: Node) -> list[Node]:
    return [port.get_source_output().get_node() for port in node.inputs()]


def _key(node: Node) -> str:
    name: str = node.get_name()
    return name
