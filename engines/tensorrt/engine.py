"""TensorRTEngine: runs a bundle's plans on an NVIDIA GPU.

Images are uploaded as the decoder's planes, or as 8-bit RGB. Features never leave the GPU; boxes
and the kept boxes' mask crops and heatmaps are downloaded. ``prefetch``, ``detect`` and ``segment``
have a stream each and are called from a thread each: the images of one batch are uploaded while the
previous batch is detected and the one before that is segmented. Rings of memory for images and
features connect them.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from importlib import import_module
from typing import Any

import av
from numpy.typing import NDArray

from maskcast.engines.bundle import Bundle
from maskcast.engines.engine import Detections, Engine, keep_detections, to_instances
from maskcast.engines.errors import InputError
from maskcast.engines.image import NetworkImage, fit_planes
from maskcast.engines.instances.instances import Instances
from maskcast.engines.instances.keypoints import decode_heatmaps
from maskcast.engines.tensorrt.device import Gpu, Memory
from maskcast.engines.tensorrt.image_ring import ImageRing
from maskcast.engines.tensorrt.plan import DeviceError, LoadedPlan, open_plans
from maskcast.engines.tensorrt.plugins.library import CudaError, Kernels
from maskcast.engines.tensorrt.steps import FEATURES, DetectStep, PoseStep, SegmentStep, Slot

_IN_FLIGHT = 3
"""Slots of features: one in each of the two stages, one between them."""

MAX_PLANE_BYTES = 4096 * 2304 * 3 // 2
"""Planes of larger images stay on the host, because each place for an image would take that much
GPU and page-locked memory."""

PlanOpener = Callable[[Bundle, tuple[int, int], Sequence[str]], Iterable[LoadedPlan]]


class TensorRTEngine(Engine):
    """Runs a bundle through TensorRT.

    Args:
        bundle: built with ``--backend tensorrt`` or ``tensorrt_rtx``.
        gpu_index: which GPU, in CUDA's order.
        open_plans: opens the plans of graphs; replaced in tests.
        spin: wait for the GPU in a busy loop: shorter waits, at the cost of a core for each of
            ``detect`` and ``segment``.
        pose: load the bundle's poser too.

    Raises:
        InputError: there is no GPU, a package is missing, a plan cannot run here, or the GPU has
            too little memory.
    """

    decode_device = "cuda"

    def __init__(
        self,
        bundle: Bundle,
        gpu_index: int = 0,
        open_plans: PlanOpener = open_plans,
        spin: bool = False,
        *,
        pose: bool = False,
    ) -> None:
        self.manifest = bundle.manifest
        self.has_pose = pose
        if not bundle.manifest.plans:
            raise InputError(
                f"{bundle.path}: has no TensorRT plan; build one with "
                f"`maskcast build {bundle.path} --backend tensorrt --out {bundle.path}`"
            )
        made = {plan.graph: plan for plan in bundle.manifest.plans}
        plan = made.get("detector", bundle.manifest.plans[0])
        self.max_batch = plan.max_batch
        self._shape = (plan.height, plan.width)
        self._range = _profiler_ranges()
        self._gpu = Gpu(gpu_index, spin)
        self.device = f"TensorRT {self._gpu.name} {plan.precision}"
        self._memory = Memory(self._gpu)
        self._plans: list[LoadedPlan] = []
        names = [name for name in bundle.manifest.graphs.present if pose or name != "poser"]
        try:
            with self._gpu.current():
                self._plans += open_plans(bundle, self._gpu.capability, names)
                opened = dict(zip(names, self._plans, strict=True))
                self._gpu.wait()  # until the contexts have their profiles
                kernels = Kernels()
                kernels.load()
                self._detect_step = DetectStep(
                    self._memory,
                    opened["detector"],
                    kernels,
                    plan.max_batch,
                    self._shape,
                    bundle.manifest.input.pad_value,
                )
                slots = [self._detect_step.slot(i) for i in range(_IN_FLIGHT)]
                features = {n: opened["detector"].shape(n, plan.max_batch) for n in FEATURES}
                self._segment_step = self._pose_step = None
                if (segmenter := opened.get("segmenter")) is not None:
                    boxes = made["segmenter"].max_boxes
                    self._segment_step = SegmentStep(
                        self._memory, segmenter, kernels, features, boxes
                    )
                if (poser := opened.get("poser")) is not None:
                    boxes = made["poser"].max_boxes
                    self._pose_step = PoseStep(self._memory, poser, features, boxes)
                # A batch in detection, the next one prefetched, and one image being copied.
                self._images = ImageRing(self._memory, 2 * plan.max_batch + 1, self._shape)
                for step in (self._detect_step, self._segment_step, self._pose_step):
                    if step is not None:
                        step.warm_up(slots)
                self._slots: queue.SimpleQueue[Slot] = queue.SimpleQueue()
                for slot in slots:
                    self._slots.put(slot)
        except BaseException:
            self.close()
            raise

    def fit(self, frame: av.VideoFrame, rotation: int) -> NetworkImage:
        """Leave resizing and conversion to the GPU if possible; see ``Engine.fit``."""
        return fit_planes(frame, rotation, self.manifest.input, MAX_PLANE_BYTES)

    def prefetch(self, image: NetworkImage) -> None:
        """Begin to upload an image; see ``Engine.prefetch``."""
        self._check_shape(image)
        with self._working("upload"):
            self._images.prefetch(image)

    def detect(self, images: Sequence[NetworkImage], min_score: float) -> Detections:
        """Find boxes in a batch; see ``Engine.detect``."""
        self._check_batch(images)
        for image in images:
            self._check_shape(image)
        slot = self._slots.get()
        release = _Once(lambda: self._slots.put(slot))
        try:
            with self._working("detect"), self._images.taken(images) as places:
                contents = [image.content for image in images]
                found = self._detect_step.run(places, contents, slot)
        except BaseException:
            release()
            raise
        kept = keep_detections(found["boxes"], found["scores"], found["labels"], min_score)
        return Detections(images=images, **kept, features=slot, release=release)

    def estimate_pose(self, detections: Detections) -> Detections:
        """Find keypoints; see ``Engine.estimate_pose``."""
        if self._pose_step is None:
            return super().estimate_pose(detections)
        with self._working("estimate poses"):
            heatmaps = self._pose_step.run(_boxes(detections), detections.features)
        points = decode_heatmaps(heatmaps, detections.boxes, self.manifest.keypoint_blur_cells)
        return replace(detections, keypoints=points)

    def segment(self, detections: Detections) -> list[Instances]:
        """Compute mask crops; see ``Engine.segment``."""
        try:
            masks = None
            if self._segment_step is not None:
                with self._working("segment"):
                    masks = self._segment_step.run(_boxes(detections), detections.features)
            return to_instances(detections, masks)
        finally:
            detections.release()

    def close(self) -> None:
        """Wait for the GPU and free its memory. No other method may be running."""
        if self._is_closed:
            return
        self._is_closed = True
        with self._gpu.current():
            self._gpu.wait()
            # TensorRT frees its memory with its objects, which a traceback may keep alive.
            for loaded in self._plans:
                loaded.close()
            self._memory.free()
        self._gpu.close()

    def _check_shape(self, image: NetworkImage) -> None:
        if image.shape != self._shape:
            raise ValueError(f"the plan takes images of {self._shape}")

    def _working(self, what: str) -> _Working:
        self._check_open()
        return _Working(self._gpu, self._range(what), what)


def _boxes(detections: Detections) -> dict[str, NDArray[Any]]:
    """Return the inputs of segmenter and poser, by name."""
    return {
        "boxes": detections.boxes,
        "labels": detections.labels,
        "batch_index": detections.image_index,
    }


class _Working:
    """Makes the GPU's context current for a block and raises its failures as DeviceError.

    A generator-based context manager would cost several microseconds in every call of the engine.
    """

    def __init__(self, gpu: Gpu, profiled: AbstractContextManager[Any], what: str) -> None:
        self._gpu, self._profiled, self._what = gpu, profiled, what

    def __enter__(self) -> None:
        try:
            self._gpu.push()
        except self._gpu.error as error:
            raise DeviceError(f"the GPU failed to {self._what}: {error}") from error
        self._profiled.__enter__()

    def __exit__(self, kind: Any, error: BaseException | None, where: Any) -> None:
        self._profiled.__exit__(kind, error, where)
        self._gpu.pop()
        if isinstance(error, (self._gpu.error, CudaError)):
            raise DeviceError(f"the GPU failed to {self._what}: {error}") from error


class _Once:
    """Calls a function when it is first called, from any thread; later calls do nothing."""

    def __init__(self, function: Callable[[], None]) -> None:
        self._functions = [function]
        self._lock = threading.Lock()

    def __call__(self) -> None:
        with self._lock:
            functions, self._functions = self._functions, []
        for function in functions:
            function()


def _profiler_ranges() -> Callable[[str], AbstractContextManager[Any]]:
    """Return a function that makes NVTX ranges for Nsight; without the package nvtx, empty ones."""
    try:
        nvtx = import_module("nvtx")
    except ImportError:
        nothing = nullcontext()
        return lambda name: nothing
    return lambda name: nvtx.annotate(f"maskcast {name}")
