"""One GPU through pycuda: its primary context, streams, and memory that is freed where it was made.

pycuda frees what it made only on a thread on which the context is current, and aborts the process
when a thread ends with a context pushed. So everything happens inside ``with gpu.current():``, and
everything is freed by hand.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from engines.errors import InputError

_NON_BLOCKING = 1


class Gpu:
    """A GPU's primary context, which torch and TensorRT share.

    Raises:
        InputError: pycuda is not installed, or there is no GPU.
    """

    def __init__(self, index: int = 0) -> None:
        try:
            import pycuda.driver as cuda
        except ImportError as error:
            raise InputError(
                "the TensorRT engine needs pycuda and an NVIDIA driver: "
                f"pip install 'maskcast[tensorrt]' ({error})"
            ) from error
        self._cuda = cuda
        try:
            cuda.init()
            device = cuda.Device(index)
        except cuda.Error as error:
            raise InputError(f"GPU {index} cannot be used: {error}") from error
        self.name = str(device.name())
        major, minor = device.compute_capability()
        self.capability = (int(major), int(minor))
        self._context = device.retain_primary_context()

    @contextmanager
    def current(self) -> Iterator[None]:
        """Make the context current on the calling thread."""
        self._context.push()
        try:
            yield
        finally:
            self._context.pop()

    def close(self) -> None:
        """Give the context back, once all memory is freed."""
        self._context.push()
        self._context.detach()
        # pycuda releases a primary context but leaves it current on this thread.
        ctypes.CDLL("libcuda.so.1").cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))

    def stream(self) -> Any:
        """Make a stream that never waits for the default stream."""
        return self._cuda.Stream(_NON_BLOCKING)

    def event(self) -> Any:
        """Make an event; whoever waits for it sleeps, and burns no core."""
        flags = self._cuda.event_flags
        return self._cuda.Event(flags.BLOCKING_SYNC | flags.DISABLE_TIMING)

    def allocate(self, size: int) -> Any:
        """Allocate device memory, bytes. Free it with its ``free()``."""
        return self._cuda.mem_alloc(size)

    def upload(self, to: int, array: NDArray[Any], stream: Any) -> None:
        """Copy a page-locked array up, asynchronously."""
        self._cuda.memcpy_htod_async(to, array, stream)

    def download(self, array: NDArray[Any], source: int, stream: Any) -> None:
        """Copy into a page-locked array, asynchronously."""
        self._cuda.memcpy_dtoh_async(array, source, stream)

    def free_bytes(self) -> int:
        """Ask how much device memory is free."""
        return int(self._cuda.mem_get_info()[0])

    def pinned(self, shape: Sequence[int], dtype: DTypeLike) -> NDArray[Any]:
        """Make a page-locked host array. Free it with ``release``."""
        return np.asarray(self._cuda.pagelocked_empty(tuple(shape), dtype))

    @staticmethod
    def release(*arrays: NDArray[Any]) -> None:
        """Free page-locked arrays; they must not be touched afterwards."""
        for array in arrays:
            owner: Any = array
            while isinstance(owner, np.ndarray):
                owner = owner.base
            owner.free()
