"""One GPU through pycuda: its primary context, streams, and memory that is freed where it was made.

pycuda frees what it made only on a thread on which the context is current, and aborts the process
when a thread ends with a context pushed. So everything happens inside ``with gpu.current():``, and
everything is freed by hand.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from maskcast.engines.errors import InputError
from maskcast.engines.tensorrt.plugins.library import driver_too_old

_NON_BLOCKING = 1


class Event:
    """A point on a stream that others wait for.

    pycuda's own objects go when nobody refers to them, and a traceback may refer to them for long;
    this one and ``Stream`` are passed around in their place.
    """

    def __init__(self, raw: Any) -> None:
        self.raw = raw

    def record(self, stream: Stream) -> None:
        """Mark what is on a stream now."""
        self.raw.record(stream.raw)

    def wait(self) -> None:
        """Wait until what was marked is done; not at all before the first mark."""
        self.raw.synchronize()

    def free(self) -> None:
        """Give the event back to CUDA."""
        self.raw = None


class Stream:
    """A stream, and the event that is waited for at its end."""

    def __init__(self, raw: Any, done: Event) -> None:
        self.raw, self._done = raw, done

    @property
    def handle(self) -> int:
        """CUDA's own handle, as TensorRT takes it."""
        return int(self.raw.handle)

    def wait(self) -> None:
        """Wait until everything that is on the stream now is done."""
        self._done.record(self)
        self._done.wait()

    def follow(self, event: Event) -> None:
        """Let what is put on the stream from now on begin after an event; nobody waits here."""
        self.raw.wait_for_event(event.raw)

    def free(self) -> None:
        """Give the stream back to CUDA."""
        self._done.free()
        self.raw = None


class Gpu:
    """A GPU's primary context, which torch and TensorRT share.

    Raises:
        InputError: pycuda is not installed, there is no GPU, or its driver is too old.
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
        self.error: type[Exception] = cuda.Error
        try:
            cuda.init()
            device = cuda.Device(index)
        except cuda.Error as error:
            raise InputError(f"GPU {index} cannot be used: {error}") from error
        reason = driver_too_old()
        if reason is not None:
            raise InputError(f"GPU {index} cannot be used: {reason}")
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

    def wait(self) -> None:
        """Wait until the GPU has nothing left to do, or is lost."""
        # A lost GPU was reported to whoever waited for its work; here it is idle all the same.
        with suppress(self._cuda.Error):
            self._cuda.Context.synchronize()

    def stream(self) -> Stream:
        """Make a stream that never waits for the default stream."""
        return Stream(self._cuda.Stream(_NON_BLOCKING), self.event())

    def event(self) -> Event:
        """Make an event; whoever waits for it sleeps, and burns no core."""
        flags = self._cuda.event_flags
        return Event(self._cuda.Event(flags.BLOCKING_SYNC | flags.DISABLE_TIMING))

    def allocate(self, size: int) -> Any:
        """Allocate device memory, bytes. Free it with its ``free()``."""
        return self._cuda.mem_alloc(size)

    def upload(self, to: int, array: NDArray[Any], stream: Stream) -> None:
        """Copy a page-locked array up, asynchronously."""
        self._cuda.memcpy_htod_async(to, array, stream.raw)

    def download(self, array: NDArray[Any], source: int, stream: Stream) -> None:
        """Copy into a page-locked array, asynchronously."""
        self._cuda.memcpy_dtoh_async(array, source, stream.raw)

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


class Memory:
    """All that an engine holds of a GPU, to be freed together.

    Raises:
        InputError: from ``device``, where the GPU has less memory left.
    """

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu
        self._device: list[Any] = []
        self._pinned: list[NDArray[Any]] = []
        self._streams: list[Stream | Event] = []

    def device(self, shape: Sequence[int], dtype: DTypeLike) -> int:
        """Allocate an array on the device; return its address."""
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        free = self.gpu.free_bytes()
        if size > free:
            raise InputError(
                f"the GPU has {free / 1e6:.0f} MB free, and {size / 1e6:.0f} MB more are needed; "
                "close other programs, or build the bundle with a smaller --size or --batch"
            )
        self._device.append(self.gpu.allocate(size))
        return int(self._device[-1])

    def pinned(self, shape: Sequence[int], dtype: DTypeLike) -> NDArray[Any]:
        """Make a page-locked array on the host."""
        self._pinned.append(self.gpu.pinned(shape, dtype))
        return self._pinned[-1]

    def stream(self) -> Stream:
        """Make a stream."""
        stream = self.gpu.stream()
        self._streams.append(stream)
        return stream

    def event(self) -> Event:
        """Make an event."""
        event = self.gpu.event()
        self._streams.append(event)
        return event

    def free(self) -> None:
        """Free everything; nothing of it may be in use."""
        for held in (*self._device, *self._streams):
            held.free()
        self.gpu.release(*self._pinned)
        self._device, self._pinned, self._streams = [], [], []
