"""Pickled numpy arrays, read without running anything that the file holds.

A pickle is a program that calls the functions it names. numpy's own functions are not safe to call:
for an array of objects, they use the file's bytes as pointers. Each name in a pickled array is
therefore resolved to a stand-in below, which checks its arguments and builds arrays of numbers
only.
"""

from __future__ import annotations

import pickle
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maskcast.engines.errors import InputError

_NUMBERS = re.compile(r"b1|[iu][1248]|f[248]|c(8|16)")
_ORDERS = ("<", ">", "|", "=")


class _DType:
    """Stands in for ``numpy.dtype``: booleans, integers and floats, no objects and no fields."""

    def __init__(self, code: str, align: bool = False, copy: bool = False) -> None:
        if not _NUMBERS.fullmatch(code):
            raise pickle.UnpicklingError(f"it holds an array of type {code!r}, not of numbers")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        order, *fields = state[1:5]  # of (version, order, subarray, names, fields, ...)
        if order not in _ORDERS or fields != [None, None, None]:
            raise pickle.UnpicklingError("it holds an array of records, not of numbers")
        self.dtype = self.dtype.newbyteorder(order)


class _Array:
    """Stands in for ``numpy.ndarray`` while the file is read."""

    array: NDArray[Any]

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, is_fortran, data = state
        self.array = _array(data, dtype, shape, "F" if is_fortran else "C")


def _reconstruct(kind: type, shape: tuple[int, ...], code: Any) -> _Array:
    """Stands in for ``numpy``'s ``_reconstruct``: its result is filled by ``__setstate__``."""
    if kind is not _Array:
        raise pickle.UnpicklingError("it holds an array of another class")
    return _Array()


def _scalar(dtype: Any, data: Any) -> Any:
    """Stands in for ``numpy``'s ``scalar``."""
    return _array(data, dtype, (), "C")[()]


def _frombuffer(data: Any, dtype: Any, shape: tuple[int, ...], order: str) -> _Array:
    """Stands in for ``numpy``'s ``_frombuffer``, of protocol 5."""
    result = _Array()
    result.array = _array(data, dtype, shape, order)
    return result


def _encode_latin1(text: str, encoding: str) -> bytes:
    """Stands in for ``codecs.encode``, which Python 2's pickles use for bytes."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it asks for the codec {encoding!r}")
    return text.encode("latin1")


def _no_bytes() -> bytes:
    """Stands in for ``bytes``, which old protocols use for empty bytes."""
    return b""


def _array(data: Any, dtype: Any, shape: tuple[int, ...], order: str) -> NDArray[Any]:
    if not isinstance(dtype, _DType):
        raise pickle.UnpicklingError("it holds an array without a type")
    if isinstance(data, str):  # Python 2's bytes
        data = data.encode("latin1")
    if order not in ("C", "F"):
        raise pickle.UnpicklingError(f"it holds an array in the order {order!r}")
    flat = np.frombuffer(bytes(data), dtype.dtype) if data else np.zeros(0, dtype.dtype)
    return flat.reshape(shape, order="C" if order == "C" else "F").copy()


_STAND_INS: dict[tuple[str, str], Any] = {
    ("numpy", "dtype"): _DType,
    ("numpy", "ndarray"): _Array,
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy._core.multiarray", "scalar"): _scalar,
    ("numpy.core.numeric", "_frombuffer"): _frombuffer,
    ("numpy._core.numeric", "_frombuffer"): _frombuffer,
    ("collections", "OrderedDict"): OrderedDict,
    ("_codecs", "encode"): _encode_latin1,
    ("__builtin__", "bytes"): _no_bytes,
}


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickles builtins and arrays of numbers; any other name in a file is refused."""

    def find_class(self, module: str, name: str) -> Any:
        """Resolve a name that the file asks for."""
        try:
            return _STAND_INS[module, name]
        except KeyError:
            raise pickle.UnpicklingError(
                f"it names {module}.{name}, which is not part of an array"
            ) from None


def read_pickle(path: Path) -> dict[str, Any]:
    """Read a pickled checkpoint: a dictionary of arrays, or one with such a dictionary as "model".

    Raises:
        InputError: the file is missing or truncated, or holds more than builtins and arrays of
            numbers.
    """
    try:
        with path.open("rb") as file:
            content = _ArrayUnpickler(file, encoding="latin1").load()
    except FileNotFoundError:
        raise InputError(f"{path}: no such checkpoint") from None
    # A damaged pickle can raise any exception.
    except Exception as error:
        raise InputError(f"{path}: not a checkpoint of arrays ({error})") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: not a checkpoint, it holds a {type(content).__name__}")
    for weights in (content, content.get("model")):
        if isinstance(weights, dict):
            for name, value in weights.items():
                if isinstance(value, _Array):
                    weights[name] = getattr(value, "array", None)
    return content
