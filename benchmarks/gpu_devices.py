"""Devices that run the kernels: a GPU through torch, or the host driver of the tests."""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor


class TorchDevice:
    """A GPU through torch."""

    name = torch = "cuda"

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
        """Return the median GPU time; ``cold``: after writing 256 MB."""
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

    @staticmethod
    def call(
        work: Callable[[list[int], int], None], inputs: Sequence[Tensor], outputs: Sequence[Tensor]
    ) -> None:
        """Run work on the addresses of tensors and on torch's stream."""
        stream = int(torch.cuda.current_stream().cuda_stream)
        work([tensor.data_ptr() for tensor in (*inputs, *outputs)], stream)

    @staticmethod
    def enqueue(stream: int, work: Callable[[], None]) -> None:
        """Run torch's work on a stream that is not torch's."""
        with torch.cuda.stream(torch.cuda.ExternalStream(stream)):
            work()

    @staticmethod
    def tensor_at(address: int, shape: tuple[int, ...], dtype: Any) -> Tensor:
        """Make a tensor of memory that is not torch's."""
        interface = {
            "shape": shape, "typestr": np.dtype(dtype).str, "data": (address, False), "version": 2,
        }  # fmt: skip
        return torch.as_tensor(SimpleNamespace(__cuda_array_interface__=interface), device="cuda")

    @staticmethod
    def free_bytes() -> int:
        """Return the free memory of the GPU, including what torch has cached."""
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info()[0])

    def replay_torch(self, work: Callable[[], Any]) -> Callable[[], Any]:
        """Capture torch's work in a CUDA graph; return a function that launches it."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        return graph.replay

    def close(self) -> None:
        """Leave the context to torch."""

    def replay(self, work: Callable[[], Any]) -> Callable[[], Any]:
        """Capture work in a CUDA graph; return a function that launches it."""
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
    torch = "cpu"

    def __init__(self) -> None:
        from maskcast.engines.tensorrt.device import Gpu

        self._gpu = Gpu()
        self._held: list[Any] = []
        self._functions: list[Any] = []
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

    def call(
        self,
        work: Callable[[list[int], int], None],
        inputs: Sequence[Tensor],
        outputs: Sequence[Tensor],
    ) -> None:
        """Run work on copies of tensors."""
        held = [self.put(tensor.numpy()) for tensor in (*inputs, *outputs)]
        work([self.pointer(one) for one in held], self.stream)
        for tensor, one in zip(outputs, held[len(inputs) :], strict=True):
            tensor.copy_(torch.from_numpy(self.get(one)))

    def enqueue(self, stream: int, work: Callable[[], None]) -> None:
        function = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda _: work())
        self._functions.append(function)  # until it has run
        driver = ctypes.CDLL("libcuda.so.1")
        if status := driver.cuLaunchHostFunc(ctypes.c_void_p(stream), function, None):
            raise RuntimeError(f"cuLaunchHostFunc: status {status}")

    @staticmethod
    def tensor_at(address: int, shape: tuple[int, ...], dtype: Any) -> Tensor:
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        memory = (ctypes.c_char * size).from_address(address)
        return torch.from_numpy(np.frombuffer(memory, dtype).reshape(shape))

    def free_bytes(self) -> int:
        return self._gpu.free_bytes()

    @staticmethod
    def replay_torch(work: Callable[[], Any]) -> Callable[[], Any]:
        return work

    def close(self) -> None:
        self.wait()
        self._stream.free()
        for memory, staged in self._held:
            memory.free()
            self._gpu.release(staged)
        self._current.__exit__(None, None, None)
        self._gpu.close()
