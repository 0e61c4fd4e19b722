"""Measure the host time of the TensorRT engine itself per frame.

The plans do nothing, which leaves the engine's Python, pycuda and the CUDA driver. On the host
driver of the tests the kernels do nothing either.
"""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
from msgspec.structs import replace

from maskcast.engines.bundle import Bundle, FixedInput, open_bundle
from maskcast.engines.engine import Detections
from maskcast.engines.image import NetworkImage
from maskcast.engines.plan import Plan
from maskcast.engines.tensorrt.engine import TensorRTEngine
from maskcast.engines.tensorrt.plan import LoadedPlan

SIZE = (288, 512)
_BOXES, _DETECTIONS = 8, 100


class IdleContext:
    """An execution context that puts nothing on the stream."""

    def __init__(self, capturable: bool) -> None:
        self._capturable = capturable

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        return True

    def execute_async_v3(self, stream: int) -> bool:
        return True

    def is_stream_capturable(self, stream: int) -> bool:
        return self._capturable


class IdleEngine:
    """The tensors of the default model's detector or segmenter."""

    def __init__(self, name: str) -> None:
        height, width = SIZE
        features = {f"p{i}": (-1, 128, height >> i, width >> i) for i in range(2, 6)}
        of = {
            "detector": {
                "images": (-1, 3, height, width), "sizes": (-1, 2), "boxes": (-1, _DETECTIONS, 4),
                "scores": (-1, _DETECTIONS), "labels": (-1, _DETECTIONS), "counts": (-1,),
            },
            "segmenter": {
                "boxes": (-1, 4), "labels": (-1,), "batch_index": (-1,), "masks": (-1, 28, 28),
            },
        }  # fmt: skip
        self._shapes = {**of[name], **features}
        self._outputs = {"counts", "masks"}
        if name == "detector":
            self._outputs |= {"boxes", "scores", "labels", *features}
        self._most = {**dict.fromkeys(of["segmenter"], _DETECTIONS), "images": 1, "sizes": 1}
        self.num_io_tensors = len(self._shapes)

    def get_tensor_name(self, index: int) -> str:
        return list(self._shapes)[index]

    def get_tensor_mode(self, name: str) -> Any:
        return SimpleNamespace(name="OUTPUT" if name in self._outputs else "INPUT")

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        most = self._most.get(name, 1)
        return [(n, *self._shapes[name][1:]) for n in (1, most, most)]

    def get_tensor_dtype(self, name: str) -> Any:
        types = {"labels": "INT64", "counts": "INT64", "batch_index": "INT32"}
        kind = "HALF" if name[0] == "p" else types.get(name, "FLOAT")
        return SimpleNamespace(name=kind)


def open_idle_engine(*, graphs: bool) -> TensorRTEngine:
    """Open the engine with plans that do nothing."""
    bundle = open_bundle("default")
    plan = Plan(
        graph="detector", file="detector.plan", sha256="0" * 64, package="tensorrt",
        version="1.0", capabilities=("8.9",), precision="fp16", height=SIZE[0], width=SIZE[1],
        max_batch=1, graph_sha256="0" * 64, plugins={},
    )  # fmt: skip
    plans = (plan, replace(plan, graph="segmenter", max_boxes=_DETECTIONS))
    manifest = replace(
        bundle.manifest, backend="tensorrt", precision="fp16", input=FixedInput(*SIZE), plans=plans
    )

    def open_plans(
        bundle: Bundle, capability: tuple[int, int], names: Sequence[str]
    ) -> Iterator[LoadedPlan]:
        for name in names:
            yield LoadedPlan(IdleEngine(name), [IdleContext(graphs)], name)

    return TensorRTEngine(Bundle(bundle.path, manifest), open_plans=open_plans)


def frame_us(engine: TensorRTEngine, frames: int) -> float:
    """Return the median time of detecting and of eight masks; the image is uploaded before."""
    rng = np.random.default_rng(0)
    corner = rng.uniform(0, 200, (_BOXES, 2))
    boxes = np.concatenate([corner, corner + 60], 1).astype(np.float32)
    image = NetworkImage(np.zeros((*SIZE, 3), np.uint8), SIZE, SIZE)
    times = []
    for _ in range(frames):
        engine.prefetch(image)
        start = time.perf_counter()
        found = engine.detect([image], 0.5)
        detections = Detections(
            images=found.images, boxes=boxes, scores=np.ones(_BOXES, np.float32),
            labels=np.ones(_BOXES, np.int32), image_index=np.zeros(_BOXES, np.int32),
            features=found.features, release=found.release,
        )  # fmt: skip
        engine.segment(detections)
        times.append(1e6 * (time.perf_counter() - start))
    return statistics.median(times)


def host_time(*, dry: bool, frames: int = 300) -> dict[str, float]:
    """Time a frame with and without CUDA graphs, and while other Python threads are busy."""
    from benchmarks.gpu_kernels import busy_threads

    if dry:
        ctypes.CDLL("libcuda.so.1").host_driver_idle(1)
    found = {}
    for graphs in (False, True):
        engine = open_idle_engine(graphs=graphs)
        frame_us(engine, 20)
        for threads in (0, 1, 4):
            with busy_threads(threads):
                name = f"{'CUDA graphs' if graphs else 'no CUDA graphs'}, {threads} busy threads"
                found[name] = frame_us(engine, frames if threads == 0 else 50)
        engine.close()
    if dry:
        ctypes.CDLL("libcuda.so.1").host_driver_idle(0)
    return found
