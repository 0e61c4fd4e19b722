"""Where the kernels run: a GPU through torch, or the host driver of the tests."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch


class TorchDevice:
    """A GPU through torch."""

    name = "cuda"

    def __init__(self) -> None:
        torch.cuda.init()
        self._stream = torch.cuda.Stream()
        self.stream = int(self._stream.cuda_stream)
        torch.zeros(1, device="cuda")  # makes the context current

    def put(self, array: Any) -> Any:
        """Copy an array to the GPU; ``pointer`` gives its address."""
        return torch.from_numpy(np.ascontiguousarray(array)).cuda()

    @staticmethod
    def pointer(held: Any) -> int:
        return int(held.data_ptr())

    def get(self, held: Any) -> Any:
        self.wait()
        return held.cpu().numpy()

    def wait(self) -> None:
        torch.cuda.synchronize()

    def time_us(self, work: Callable[[], Any], repeat: int, *, cold: bool) -> float:
        """Median of GPU times; ``cold``: after 256 MB have been written."""
        flush = torch.empty(64 << 20, device="cuda") if cold else None
        times = []
        with torch.cuda.stream(self._stream):
            for i in range(repeat + 20):
                if flush is not None:
                    flush.fill_(i)
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record(self._stream)
                work()
                end.record(self._stream)
                end.synchronize()
                times.append(1000 * start.elapsed_time(end))
        return statistics.median(times[20:])

    def close(self) -> None:
        """Leave the context to torch."""

    def replay(self, work: Callable[[], Any]) -> Callable[[], Any]:
        """Capture work in a CUDA graph; returns what launches it."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._stream):
            graph.capture_begin()
            work()
            graph.capture_end()

        def launch() -> None:
            with torch.cuda.stream(self._stream):
                graph.replay()

        return launch


class HostDevice:
    """The host driver of the tests through pycuda, in TorchDevice's place."""

    name = "host driver"

    def __init__(self) -> None:
        from maskcast.engines.tensorrt.device import Gpu

        self._gpu = Gpu()
        self._held: list[Any] = []
        self._current = self._gpu.current()
        self._current.__enter__()
        self._stream = self._gpu.stream()
        self.stream = self._stream.handle

    def put(self, array: Any) -> Any:
        array = np.ascontiguousarray(array)
        memory = self._gpu.allocate(max(array.nbytes, 1))
        staged = self._gpu.pinned(array.shape, array.dtype)
        staged[...] = array
        if array.nbytes:
            self._gpu.upload(int(memory), staged, self._stream)
        self._held.append((memory, staged))
        return memory, staged

    @staticmethod
    def pointer(held: Any) -> int:
        return int(held[0])

    def get(self, held: Any) -> Any:
        self._gpu.download(held[1], int(held[0]), self._stream)
        self.wait()
        return held[1]

    def wait(self) -> None:
        self._stream.wait()

    def time_us(self, work: Callable[[], Any], repeat: int, *, cold: bool) -> float:
        del repeat, cold
        start = time.perf_counter()
        work()
        self.wait()
        return 1e6 * (time.perf_counter() - start)

    def replay(self, work: Callable[[], Any]) -> Callable[[], Any]:
        graph = self._gpu.capture(self._stream, lambda: work() and None)
        if graph is None:
            raise RuntimeError("the stream could not be captured")
        return graph.launcher(self._stream)

    def close(self) -> None:
        self.wait()
        self._stream.free()
        for memory, staged in self._held:
            memory.free()
            self._gpu.release(staged)
        self._current.__exit__(None, None, None)
        self._gpu.close()
