"""TensorRTEngine: runs a bundle's plans on an NVIDIA GPU.

Pictures go up as 8-bit RGB; features never leave the GPU; boxes and the kept boxes' mask crops come
down. ``prefetch``, ``detect`` and ``segment`` have a stream each and are called from a thread each:
the pictures of one batch go up while the batch before it is detected and the one before that gets
its masks. Pictures and features lie in rings of places between them.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from maskcast.engines.bundle import Bundle
from maskcast.engines.engine import Detections, Engine, keep_detections, to_instances
from maskcast.engines.errors import InputError
from maskcast.engines.image import NetworkImage
from maskcast.engines.instances import Instances
from maskcast.engines.tensorrt.device import Gpu, Memory
from maskcast.engines.tensorrt.image_ring import ImageRing, Place
from maskcast.engines.tensorrt.plan import DeviceError, LoadedPlan, open_plans
from maskcast.engines.tensorrt.plugins.library import CudaError, Kernels

_FEATURES = ("p2", "p3", "p4", "p5")
_DOWN = ("boxes", "scores", "labels")
_IN_FLIGHT = 3
"""Slots of features: one in each of the two stages, one between them."""

PlanOpener = Callable[[Bundle, tuple[int, int]], Iterable[LoadedPlan]]


class TensorRTEngine(Engine):
    """Runs a bundle through TensorRT.

    Args:
        bundle: built with ``--backend tensorrt`` or ``tensorrt_rtx``.
        gpu_index: which GPU, as CUDA counts them.
        open_plans: how its plans become contexts; tests give their own.

    Raises:
        InputError: no GPU, a package missing, a plan that does not fit, too little GPU memory.
    """

    def __init__(
        self, bundle: Bundle, gpu_index: int = 0, open_plans: PlanOpener = open_plans
    ) -> None:
        self.manifest = bundle.manifest
        if not bundle.manifest.plans:
            raise InputError(
                f"{bundle.path}: has no TensorRT plan; build one with "
                f"`maskcast build {bundle.path} --backend tensorrt --out {bundle.path}`"
            )
        plan = bundle.manifest.plans[0]
        self.max_batch = plan.max_batch
        self._shape = (plan.height, plan.width)
        self._range = _profiler_ranges()
        self._gpu = Gpu(gpu_index)
        self.device = f"TensorRT {self._gpu.name} {plan.precision}"
        self._memory = Memory(self._gpu)
        self._closed = False
        self._plans: list[LoadedPlan] = []
        try:
            with self._gpu.current():
                self._plans += open_plans(bundle, self._gpu.capability)
                self._kernels = Kernels()
                self._kernels.load()
                self._detect_side = _DetectSide(
                    self._memory, self._plans[0], plan.max_batch, self._shape
                )
                self._segment_side = (
                    _SegmentSide(self._memory, self._plans[1], bundle.manifest.plans[1].max_boxes)
                    if len(self._plans) > 1
                    else None
                )
                # A batch in detection, the next one on its way, and one picture being copied.
                self._pictures = ImageRing(self._memory, 2 * plan.max_batch + 1, self._shape)
                self._slots: queue.SimpleQueue[dict[str, int]] = queue.SimpleQueue()
                for _ in range(_IN_FLIGHT):
                    self._slots.put(self._detect_side.features(self._memory))
        except BaseException:
            self.close()
            raise

    def prefetch(self, image: NetworkImage) -> None:
        """Begin to upload an image; see ``Engine.prefetch``."""
        self._check_shape(image)
        with self._working("upload"):
            self._pictures.prefetch(image)

    def detect(self, images: Sequence[NetworkImage], min_score: float) -> Detections:
        """Find boxes in a batch; see ``Engine.detect``."""
        if not 1 <= len(images) <= self.max_batch:
            raise ValueError(f"{len(images)} images, and the plan takes 1 to {self.max_batch}")
        for image in images:
            self._check_shape(image)
        slot = self._slots.get()
        release = _Once(lambda: self._slots.put(slot))
        try:
            with self._working("detect"), self._pictures.taken(images) as places:
                found = self._run_detector(images, places, slot)
        except BaseException:
            release()
            raise
        kept = keep_detections(found["boxes"], found["scores"], found["labels"], min_score)
        return Detections(images=images, **kept, features=slot, release=release)

    def segment(self, detections: Detections) -> list[Instances]:
        """Compute mask crops; see ``Engine.segment``."""
        try:
            masks = None
            if self._segment_side is not None:
                with self._working("segment"):
                    masks = self._run_segmenter(self._segment_side, detections)
            return to_instances(detections, masks)
        finally:
            detections.release()

    def close(self) -> None:
        """Wait for the GPU and free its memory. Both stages must have ended."""
        if self._closed:
            return
        self._closed = True
        with self._gpu.current():
            self._gpu.wait()
            # TensorRT's own memory goes with its objects, which a traceback may hold for longer.
            for loaded in self._plans:
                loaded.close()
            self._memory.free()
        self._gpu.close()

    def _check_shape(self, image: NetworkImage) -> None:
        if image.pixels.shape[:2] != self._shape:
            raise ValueError(f"the plan takes images of {self._shape}")

    def _run_detector(
        self, images: Sequence[NetworkImage], places: Sequence[Place], slot: dict[str, int]
    ) -> dict[str, NDArray[Any]]:
        """Convert, detect, download; the arrays hold until the next call."""
        side, count, (height, width) = self._detect_side, len(images), self._shape
        stream = side.stream
        for i, image in enumerate(images):
            side.host["sizes"][i] = image.content
        self._gpu.upload(side.device["sizes"], side.host["sizes"][:count], stream)
        for place in places:
            stream.follow(place.uploaded)
        # The pictures have the network's size already: libswscale resizes while it converts YUV to
        # RGB. What is left is bytes to planar floats.
        pictures = [place.device for place in places]
        self._kernels.preprocess(pictures, side.device["images"], height * width, stream.handle)
        side.plan.run(
            {"images": (count, 3, height, width), "sizes": (count, 2)},
            {name: side.device[name] for name in side.names} | slot,
            stream.handle,
        )
        found = {name: side.host[name][:count] for name in _DOWN}
        for name, array in found.items():
            self._gpu.download(array, side.device[name], stream)
        stream.wait()
        return found

    def _run_segmenter(self, side: _SegmentSide, detections: Detections) -> NDArray[np.float32]:
        count = len(detections.boxes)
        if count == 0:
            return np.zeros((0, *side.host["masks"].shape[1:]), np.float32)
        given: dict[str, NDArray[Any]] = {
            "boxes": detections.boxes,
            "labels": detections.labels,
            "batch_index": detections.image_index,
        }
        for name, array in given.items():
            side.host[name][:count] = array
            self._gpu.upload(side.device[name], side.host[name][:count], side.stream)
        images = self._detect_side.plan
        shapes = {name: images.shape(name, len(detections.images)) for name in _FEATURES}
        shapes |= {name: (count, *side.host[name].shape[1:]) for name in given}
        side.plan.run(
            shapes,
            {name: side.device[name] for name in (*given, "masks")} | detections.features,
            side.stream.handle,
        )
        masks = side.host["masks"][:count]
        self._gpu.download(masks, side.device["masks"], side.stream)
        side.stream.wait()
        return masks

    @contextmanager
    def _working(self, what: str) -> Iterator[None]:
        """Work on the GPU; whatever goes wrong there is a DeviceError."""
        try:
            with self._gpu.current(), self._range(what):
                yield
        except (self._gpu.error, CudaError) as error:
            raise DeviceError(f"the GPU failed to {what}: {error}") from error


class _DetectSide:
    """What ``detect`` alone uses; one batch at a time, since the call waits for its boxes."""

    def __init__(
        self, memory: Memory, plan: LoadedPlan, max_batch: int, shape: tuple[int, int]
    ) -> None:
        self.plan = plan
        others = [name for name in plan.outputs if name not in _FEATURES]
        self.names = ("images", "sizes", *others)
        shapes: dict[str, tuple[tuple[int, ...], DTypeLike]] = {
            "images": ((max_batch, 3, *shape), np.float32),
            "sizes": ((max_batch, 2), np.float32),
            **{name: (plan.shape(name, max_batch), plan.dtype(name)) for name in others},
        }
        self.device = {name: memory.device(*spec) for name, spec in shapes.items()}
        self.host = {name: memory.pinned(*shapes[name]) for name in ("sizes", *_DOWN)}
        self._max_batch = max_batch
        self.stream = memory.stream()

    def features(self, memory: Memory) -> dict[str, int]:
        """Allocate one slot: the pyramid of a batch, by name."""
        return {
            name: memory.device(self.plan.shape(name, self._max_batch), self.plan.dtype(name))
            for name in _FEATURES
        }


class _SegmentSide:
    """What ``segment`` alone uses."""

    def __init__(self, memory: Memory, plan: LoadedPlan, max_boxes: int) -> None:
        self.plan = plan
        shapes: dict[str, tuple[tuple[int, ...], DTypeLike]] = {
            name: (plan.shape(name, max_boxes), plan.dtype(name))
            for name in ("boxes", "labels", "batch_index", "masks")
        }
        self.device = {name: memory.device(*spec) for name, spec in shapes.items()}
        self.host = {name: memory.pinned(*spec) for name, spec in shapes.items()}
        self.stream = memory.stream()


class _Once:
    """Calls a function at its own first call, from whatever thread."""

    def __init__(self, function: Callable[[], None]) -> None:
        self._functions = [function]
        self._lock = threading.Lock()

    def __call__(self) -> None:
        with self._lock:
            functions, self._functions = self._functions, []
        for function in functions:
            function()


def _profiler_ranges() -> Callable[[str], AbstractContextManager[Any]]:
    """NVTX ranges for Nsight where the package nvtx is installed; else nothing."""
    try:
        nvtx = import_module("nvtx")
    except ImportError:
        return lambda name: nullcontext()
    return lambda name: nvtx.annotate(f"maskcast {name}")
