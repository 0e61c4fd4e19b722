"""ONNX files: checks of a graph before an inference library opens it.

Reads the protobuf wire format, so that running a bundle needs no ONNX package.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from maskcast.engines.errors import InputError

_MAX_DEPTH = 256
"""Maximum nesting of messages; each graph within a graph adds three levels."""

# For each message of onnx.proto, by field number: the messages that may contain a tensor.
_MESSAGES: dict[str, dict[int, str]] = {
    "model": {7: "graph", 25: "function"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {
        5: "tensor",
        6: "graph",
        10: "tensor",
        11: "graph",
        22: "sparse",
        23: "sparse",
    },
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {},
}
_EXTERNAL_DATA, _DATA_LOCATION = 13, 14
_INPUTS, _OUTPUTS = 11, 12
_OPERATOR = 4


class GraphPorts(NamedTuple):
    """Names of a graph's inputs and outputs."""

    inputs: frozenset[str]
    outputs: frozenset[str]


def check_graph(path: Path, ports: GraphPorts) -> None:
    """Check that a file is an ONNX model with certain inputs and outputs, complete in one file.

    Args:
        path: a regular file.
        ports: what the graph must have; it may have more outputs.

    Raises:
        InputError: it is not such a model, or part of its data is in other files.
    """
    found = _read(path)
    if found.inputs != ports.inputs or not ports.outputs <= found.outputs:
        raise InputError(
            f"{path}: not the expected graph (inputs {_join(found.inputs)}, outputs "
            f"{_join(found.outputs)}); build the bundle again"
        )


def is_quantised(path: Path) -> bool:
    """Return whether a graph has layers that are computed in int8.

    Raises:
        InputError: the file is not an ONNX model.
    """
    return "QuantizeLinear" in _read(path).operators


class _Contents(NamedTuple):
    inputs: set[str]
    outputs: set[str]
    operators: set[str]


def _read(path: Path) -> _Contents:
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _read_model(data)
    except (ValueError, OSError):  # an empty file cannot be mapped
        raise InputError(f"{path}: not an ONNX model; build the bundle again") from None
    except _ExternalDataError:
        raise InputError(
            f"{path}: its weights are in other files, which are not checked; "
            "save it as one file and build the bundle again"
        ) from None


class _ExternalDataError(Exception):
    """A tensor's data is outside the file."""


def _join(names: set[str]) -> str:
    shown = ", ".join(sorted(names)[:8])
    return shown[:200].encode("ascii", "replace").decode() or "nothing"


def _read_model(data: mmap.mmap) -> _Contents:
    """Read the main graph's inputs and outputs and all operators.

    Raises:
        ValueError: the data is not a model.
    """
    contents = _Contents(set(), set(), set())
    waiting = [("model", 0, len(data), 0)]
    graphs = 0
    while waiting:
        kind, start, end, depth = waiting.pop()
        if depth > _MAX_DEPTH:
            raise ValueError("nested too deeply")
        is_main = kind == "graph" and depth == 1
        graphs += is_main
        for number, value, first, last in _fields(data, start, end):
            if kind == "tensor" and (
                number == _EXTERNAL_DATA or (number == _DATA_LOCATION and value)
            ):
                raise _ExternalDataError
            if is_main and number in (_INPUTS, _OUTPUTS):
                names = contents.inputs if number == _INPUTS else contents.outputs
                names.add(_value_name(data, first, last))
            if kind == "node" and number == _OPERATOR and first >= 0:
                contents.operators.add(data[first:last].decode())
            if first >= 0 and number in _MESSAGES[kind]:
                waiting.append((_MESSAGES[kind][number], first, last, depth + 1))
    if graphs != 1:
        raise ValueError("no graph")
    return contents


def _value_name(data: mmap.mmap, start: int, end: int) -> str:
    for number, _, first, last in _fields(data, start, end):
        if number == 1 and first >= 0:
            return data[first:last].decode()
    raise ValueError("a port without a name")


def _fields(data: mmap.mmap, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield each field's number, value, start and end; start and end are -1 unless it has bytes."""
    at = start
    while at < end:
        tag, at = _varint(data, at, end)
        value, first, last = 0, -1, -1
        match tag & 7:
            case 0:
                value, at = _varint(data, at, end)
            case 1:
                at += 8
            case 2:
                length, first = _varint(data, at, end)
                at = last = first + length
            case 5:
                at += 4
            case kind:
                raise ValueError(f"wire type {kind}")
        if at > end or tag >> 3 == 0:
            raise ValueError("cut off")
        yield tag >> 3, value, first, last


def _varint(data: mmap.mmap, at: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while at < end and shift < 64:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
    raise ValueError("cut off")
