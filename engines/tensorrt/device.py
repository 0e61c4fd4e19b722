"""One GPU through pycuda: its primary context, streams, memory, and CUDA graphs.

pycuda frees objects only on a thread on which the context is current, and aborts the process when a
thread ends with a context pushed. So everything happens inside ``with gpu.current():``, and
everything is freed explicitly. pycuda has no CUDA graphs; their few calls go to the driver.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from maskcast.engines.errors import InputError
from maskcast.engines.tensorrt.plugins.library import CudaError, driver_incompatibility

_logger = logging.getLogger(__name__)

_NON_BLOCKING = 1
_BLOCKING_SYNC = 4
_CAPTURE_THIS_THREAD = 1
"""CU_STREAM_CAPTURE_MODE_THREAD_LOCAL: other threads may allocate and copy meanwhile."""
_ALIGNMENT = 256


class Event:
    """A point on a stream that other streams or the host wait for.

    pycuda frees its objects with their last reference, which a traceback may hold for a long time.
    This class and ``Stream`` hold the only one.
    """

    def __init__(self, raw: Any) -> None:
        self.raw = raw

    def record(self, stream: Stream) -> None:
        """Mark the end of the work that is now queued on a stream."""
        self.raw.record(stream.raw)

    def wait(self) -> None:
        """Wait until the marked work is done; return at once before the first mark."""
        self.raw.synchronize()

    def free(self) -> None:
        """Free the event."""
        self.raw = None


class Stream:
    """A stream, and an event to wait for its end.

    Attributes:
        handle: CUDA's, for TensorRT.
    """

    def __init__(self, raw: Any, done: Event) -> None:
        self.raw, self._done = raw, done
        self.handle = int(raw.handle)

    def wait(self) -> None:
        """Wait until all work that is now queued on the stream is done."""
        self._done.record(self)
        self._done.wait()

    def follow(self, event: Event) -> None:
        """Delay work that is queued on the stream from now on until an event; do not wait here."""
        self.raw.wait_for_event(event.raw)

    def free(self) -> None:
        """Free the stream."""
        self._done.free()
        self.raw = None


class Graph:
    """Work captured from a stream, to be launched again with one call."""

    def __init__(self, driver: ctypes.CDLL, handle: ctypes.c_void_p) -> None:
        self._driver, self._handle = driver, handle

    def launcher(self, stream: Stream) -> Callable[[], None]:
        """Return a function that queues the captured work, with its addresses, on a stream."""
        driver, launch = self._driver, self._driver.cuGraphLaunch
        graph, to = self._handle, ctypes.c_void_p(stream.handle)

        def put() -> None:
            if status := launch(graph, to):
                _check(driver, status)

        return put

    def free(self) -> None:
        """Free the graph."""
        self._driver.cuGraphExecDestroy(self._handle)


class Gpu:
    """A GPU's primary context, which torch and TensorRT share.

    Args:
        index: which GPU, in CUDA's order.
        spin: wait for the GPU in a busy loop: shorter waits, at the cost of a core per thread.

    Raises:
        InputError: pycuda is not installed, there is no GPU, or its driver is too old.
    """

    def __init__(self, index: int = 0, spin: bool = False) -> None:
        try:
            import pycuda.driver as cuda
        except ImportError as error:
            raise InputError(
                "the TensorRT engine needs pycuda and an NVIDIA driver: "
                f"pip install 'maskcast[tensorrt]' ({error})"
            ) from error
        self._cuda = cuda
        self._spin = spin
        self.error: type[Exception] = cuda.Error
        try:
            cuda.init()
            device = cuda.Device(index)
        except cuda.Error as error:
            raise InputError(f"GPU {index} cannot be used: {error}") from error
        reason = driver_incompatibility()
        if reason is not None:
            raise InputError(f"GPU {index} cannot be used: {reason}")
        self.name = str(device.name())
        major, minor = device.compute_capability()
        self.capability = (int(major), int(minor))
        self._driver = ctypes.CDLL("libcuda.so.1")
        # FFmpeg shares an existing context only if it has these flags. They do not change how the
        # engine waits: its events have flags of their own.
        self._driver.cuDevicePrimaryCtxSetFlags_v2(index, _BLOCKING_SYNC)
        self._context = device.retain_primary_context()

    @contextmanager
    def current(self) -> Iterator[None]:
        """Make the context current on the calling thread."""
        self.push()
        try:
            yield
        finally:
            self.pop()

    def push(self) -> None:
        """Make the context current until ``pop``."""
        self._context.push()

    def pop(self) -> None:
        """Restore the context that was current before ``push``."""
        self._context.pop()

    def close(self) -> None:
        """Release the context; all memory must have been freed."""
        self._context.push()
        self._context.detach()
        # pycuda releases a primary context but leaves it current on this thread.
        self._driver.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))

    def wait(self) -> None:
        """Wait until the GPU is idle, or lost."""
        # The thread that waited for its work has already reported a lost GPU.
        with suppress(self._cuda.Error):
            self._cuda.Context.synchronize()

    def stream(self) -> Stream:
        """Make a stream that never waits for the default stream."""
        return Stream(self._cuda.Stream(_NON_BLOCKING), self.event())

    def event(self) -> Event:
        """Make an event. Waiting for it sleeps, or spins."""
        flags = self._cuda.event_flags
        how = flags.DEFAULT if self._spin else flags.BLOCKING_SYNC
        return Event(self._cuda.Event(how | flags.DISABLE_TIMING))

    def capture(self, stream: Stream, work: Callable[[], None]) -> Graph | None:
        """Record what ``work`` queues on a stream, without running it; None if that fails.

        ``work`` must have run on the stream before, and must not wait.
        """
        driver, handle = self._driver, ctypes.c_void_p(stream.handle)
        graph, executable = ctypes.c_void_p(), ctypes.c_void_p()
        if driver.cuStreamBeginCapture_v2(handle, _CAPTURE_THIS_THREAD):
            return None
        failure: Exception | None = None
        try:
            work()
        except (self.error, RuntimeError) as error:
            failure = error
        status = driver.cuStreamEndCapture(handle, ctypes.byref(graph))
        if status == 0 and failure is None:
            status = driver.cuGraphInstantiateWithFlags(
                ctypes.byref(executable), graph, ctypes.c_ulonglong(0)
            )
        if graph:
            driver.cuGraphDestroy(graph)
        if status or failure is not None:
            fields = {"reason": str(failure or f"status {status}")}
            _logger.warning("graph_not_captured", extra={"fields": fields})
            return None
        return Graph(driver, executable)

    def allocate(self, size: int) -> Any:
        """Allocate device memory, bytes. Free it with its ``free()``."""
        return self._cuda.mem_alloc(size)

    def upload(self, to: int, array: NDArray[Any], stream: Stream) -> None:
        """Copy a page-locked array to the device, asynchronously."""
        self._cuda.memcpy_htod_async(to, array, stream.raw)

    def download(self, array: NDArray[Any], source: int, stream: Stream) -> None:
        """Copy from the device into a page-locked array, asynchronously."""
        self._cuda.memcpy_dtoh_async(array, source, stream.raw)

    def free_bytes(self) -> int:
        """Return the free device memory, bytes."""
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
    """The memory, streams and graphs of an engine, to be freed together."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu
        self._device: list[Any] = []
        self._pinned: list[NDArray[Any]] = []
        self._streams: list[Stream | Event | Graph] = []

    def device(self, shape: Sequence[int], dtype: DTypeLike) -> int:
        """Allocate an array on the device; return its address.

        Raises:
            InputError: the GPU has too little free memory.
        """
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

    def release(self, device: int, pinned: NDArray[Any]) -> None:
        """Free an unused array on the device and one on the host, before ``free``."""
        (held,) = (one for one in self._device if int(one) == device)
        self._device.remove(held)
        held.free()
        self._pinned = [one for one in self._pinned if one is not pinned]
        self.gpu.release(pinned)

    def graph(self, stream: Stream, work: Callable[[], None]) -> Graph | None:
        """Capture a CUDA graph; see ``Gpu.capture``."""
        graph = self.gpu.capture(stream, work)
        if graph is not None:
            self._streams.append(graph)
        return graph

    def free(self) -> None:
        """Free everything; none of it may be in use."""
        for held in (*self._device, *self._streams):
            held.free()
        self.gpu.release(*self._pinned)
        self._device, self._pinned, self._streams = [], [], []


class Block:
    """Arrays that are copied together: one piece of memory on the device, and one on the host.

    All arrays have the same first dimension, which changes from call to call. They are contiguous,
    so that one copy moves them all.

    Args:
        memory: receives the allocations.
        shapes: of one entry of each array, and its dtype.
        most: the largest first dimension.
    """

    def __init__(
        self, memory: Memory, shapes: Mapping[str, tuple[tuple[int, ...], DTypeLike]], most: int
    ) -> None:
        self._gpu = memory.gpu
        self._specs = {name: (shape, np.dtype(dtype)) for name, (shape, dtype) in shapes.items()}
        self.most = most
        size = sum(self._sizes(most))
        self._device = memory.device((size,), np.uint8)
        self._host = memory.pinned((size,), np.uint8)
        self._parts: dict[int, tuple[NDArray[Any], dict[str, NDArray[Any]]]] = {}

    def addresses(self, count: int) -> dict[str, int]:
        """Return the arrays' addresses on the device, for a first dimension."""
        return {name: self._device + offset for name, offset in self._offsets(count).items()}

    def arrays(self, count: int) -> dict[str, NDArray[Any]]:
        """Return the arrays on the host, for a first dimension."""
        return self._part(count)[1]

    def _part(self, count: int) -> tuple[NDArray[Any], dict[str, NDArray[Any]]]:
        """Return the bytes on the host that are in use, and the arrays in them."""
        part = self._parts.get(count)
        if part is None:
            part = self._host[: sum(self._sizes(count))], self._views(count)
            self._parts[count] = part
        return part

    def _views(self, count: int) -> dict[str, NDArray[Any]]:
        views = {}
        for name, offset in self._offsets(count).items():
            shape, dtype = self._specs[name]
            size = count * int(np.prod(shape)) * dtype.itemsize
            views[name] = self._host[offset : offset + size].view(dtype).reshape(count, *shape)
        return views

    def upload(self, count: int, stream: Stream) -> None:
        """Copy all arrays to the device, asynchronously."""
        self._gpu.upload(self._device, self._part(count)[0], stream)

    def download(self, count: int, stream: Stream) -> None:
        """Copy all arrays to the host, asynchronously."""
        self._gpu.download(self._part(count)[0], self._device, stream)

    def _offsets(self, count: int) -> dict[str, int]:
        offsets, at = {}, 0
        for name, size in zip(self._specs, self._sizes(count), strict=True):
            offsets[name] = at
            at += size
        return offsets

    def _sizes(self, count: int) -> list[int]:
        """Bytes of each array, rounded up so that the next one is aligned for TensorRT."""
        sizes = (count * int(np.prod(s)) * d.itemsize for s, d in self._specs.values())
        return [-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes]


def _check(driver: ctypes.CDLL, status: int) -> None:
    if status != 0:
        text = ctypes.c_char_p()
        driver.cuGetErrorString(status, ctypes.byref(text))
        reason = text.value.decode(errors="replace") if text.value else "unknown error"
        raise CudaError(f"CUDA driver: {reason} (status {status})")
