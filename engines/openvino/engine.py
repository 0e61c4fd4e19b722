"""OpenVinoEngine: runs a bundle's portable graphs on the CPU."""

from __future__ import annotations

import ctypes
import functools
import os
import sys
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from maskcast.engines.bundle import Bundle, FixedInput
from maskcast.engines.engine import Detections, Engine, Mode, keep_detections, to_instances
from maskcast.engines.image import NetworkImage
from maskcast.engines.instances.instances import Instances
from maskcast.engines.onnx_file import is_quantised
from maskcast.engines.openvino.cache import GraphCache, cache_folder, describe
from maskcast.engines.threads import mark_abandonable

if TYPE_CHECKING:
    import openvino as ov

    from maskcast.engines.openvino.streams import CompiledShape

T = TypeVar("T")

_IN_FLIGHT = 2
"""Batches that hold features: one in each of the two stages. The infer stage begins no batch while
another waits between them."""
_IMAGES_PER_STREAM = 2
"""In a batch: a stream that finishes early takes another image while the others finish."""
_MAX_STREAMS = 4
"""Each stream has graphs and weights of its own; with more cores, each stream gets several."""
_COMPILED_SHAPES = 8
"""Number of input shapes whose compiled graphs are kept, the most recently used ones."""


@functools.cache
def import_openvino() -> Any:
    """Import OpenVINO without its model converter.

    The package imports the converter, and works without it if that import fails. The converter
    takes 14 MB and two thirds of the import's time, and sends usage data to Google Analytics unless
    the user has declined.
    """
    converter = "openvino.tools.ovc"
    is_absent = converter not in sys.modules
    if is_absent:
        sys.modules[converter] = None  # type: ignore[assignment]  # its import then fails
    try:
        import openvino
    finally:
        if is_absent:
            del sys.modules[converter]
    return openvino


@functools.cache
def openvino_core() -> ov.Core:
    """Return OpenVINO's core, one for all engines, which is never freed.

    Freeing a core frees the executors of all graphs that are not in use any more. A thread that
    ran such graphs refers to them until it has ended, which is after Python's ``join`` returns:
    OpenVINO 2026.4 then uses freed memory and can abort the process.
    """
    core: ov.Core = import_openvino().Core()
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(core))  # threads also end at the interpreter's end
    return core


def has_bf16() -> bool:
    """Return whether this CPU computes in bfloat16."""
    return "BF16" in openvino_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


class OpenVinoEngine(Engine):
    """Runs a bundle through OpenVINO on the CPU.

    Graphs are compiled on a separate thread when an image of a new shape arrives or ``prepare``
    asks for it, in about a second for each core, or loaded from the user's cache folder in a third
    of that; the eight shapes used last are kept. All loaded graphs, and in mode "throughput" all
    compiled ones, are checked before they are used, see ``compile_shape``.

    Args:
        bundle: of any backend; its portable graphs are read. In ``precision`` bf16 it computes in
            bfloat16, otherwise in fp32; quantised layers are computed in int8.
        mode: "latency" takes one image at a time and gives it all cores. "throughput" takes two
            images for each stream, of which there is one for each core, up to 4; with more cores
            each stream gets several. An image takes longer, but no core waits for the others at
            the end of a layer.
        pose: load the bundle's poser too.
    """

    def __init__(self, bundle: Bundle, mode: Mode = "latency", *, pose: bool = False) -> None:
        version: str = import_openvino().__version__
        from maskcast.engines.openvino.models import Models

        self.manifest = bundle.manifest
        precision = "f32"
        if bundle.manifest.precision == "bf16":
            precision = "bf16" if has_bf16() else "f32"
            if precision == "f32":
                warnings.warn("this CPU does not compute in bf16: fp32 is used", stacklevel=2)
        # From the graph, because a manifest may have the precision of TensorRT's plans.
        computes = "int8" if is_quantised(bundle.detector) else precision.replace("f32", "fp32")
        self.device = f"OpenVINO CPU {computes}"
        cores = len(os.sched_getaffinity(0))
        self._streams = 1 if mode == "latency" else min(cores, _MAX_STREAMS)
        self._threads_of_a_stream = None if mode == "latency" else cores // self._streams
        self.max_batch = 1 if mode == "latency" else _IMAGES_PER_STREAM * self._streams
        # For streams 1 and up of two batches, one in detect and one in segment. Stream 0 runs on
        # the caller's thread.
        self._threads = ThreadPoolExecutor(2 * self._streams, "openvino")
        self._core = openvino_core()
        self.has_pose = pose
        self._models = Models(bundle, precision, pose=pose)
        how = (version, precision, self._threads_of_a_stream or f"all of {cores}")
        self._cache = GraphCache(describe(self._models.paths, *how), cache_folder())
        if not self._cache.has_entries():
            self._models.read()  # so that a graph that OpenVINO cannot read is reported now
        self._compiling = threading.Lock()
        self._shapes: OrderedDict[tuple[int, int], Future[CompiledShape]] = OrderedDict()
        self._lock = threading.Lock()
        shape = bundle.manifest.input
        if isinstance(shape, FixedInput):
            self._compiled((shape.height, shape.width)).result()

    def prepare(self, height: int, width: int) -> bool:
        """Begin to compile for a shape; see ``Engine.prepare``."""
        return self._compiled((height, width)).done()

    def detect(self, images: Sequence[NetworkImage], min_score: float) -> Detections:
        """Find boxes; see ``Engine.detect``.

        Raises:
            RuntimeError: the engine is closed, or its graphs compute different results.
            ValueError: there are more images than ``max_batch``, or none.
        """
        self._check_batch(images)
        shape = self._compiled(images[0].shape).result()
        held: list[_Release] = []

        def release() -> None:
            for one in held:
                one()

        def run(number: int, stream: int) -> dict[str, NDArray[Any]]:
            image = images[number]
            return shape.streams[stream].detect(image.pixels, image.content, held[number].features)

        try:
            held.extend(_Release(shape) for _ in images)
            outputs = self._side_by_side(run, len(images))
            boxes, scores, labels = (
                np.concatenate([one[name] for one in outputs])
                for name in ("boxes", "scores", "labels")
            )
            kept = keep_detections(boxes, scores, labels, min_score)
        except BaseException:
            release()
            raise
        return Detections(images=images, **kept, features=held, release=release)

    def estimate_pose(self, detections: Detections) -> Detections:
        """Find keypoints; see ``Engine.estimate_pose``."""
        names = self.manifest.keypoints
        if not self.has_pose or names is None:
            return super().estimate_pose(detections)
        self._check_open()
        held: list[_Release] = detections.features
        shape, k, blur_cells = held[0].shape, len(names), self.manifest.keypoint_blur_cells

        def run(number: int, stream: int) -> NDArray[np.float32]:
            boxes = detections.boxes[detections.image_index == number]
            return shape.streams[stream].estimate_pose(held[number].features, boxes, k, blur_cells)

        keypoints = np.concatenate(self._side_by_side(run, len(held)))
        return replace(detections, keypoints=keypoints)

    def segment(self, detections: Detections) -> list[Instances]:
        """Compute mask crops; see ``Engine.segment``."""
        held: list[_Release] = detections.features
        shape = held[0].shape

        def run(number: int, stream: int) -> NDArray[np.float32]:
            mine = detections.image_index == number
            boxes, labels = detections.boxes[mine], detections.labels[mine]
            return shape.streams[stream].segment(held[number].features, boxes, labels)

        try:
            self._check_open()
            masks = None
            if self.manifest.graphs.segmenter is not None:
                masks = np.concatenate(self._side_by_side(run, len(held)))
            return to_instances(detections, masks)
        finally:
            detections.release()

    def _side_by_side(self, run: Callable[[int, int], T], count: int) -> list[T]:
        """Call ``run(number, stream)`` for 0 .. count - 1, each on a stream that is free.

        Returns or raises only when all calls have ended.
        """
        numbers = iter(range(count))
        results: dict[int, T] = {}

        def work(stream: int) -> None:
            for number in numbers:
                results[number] = run(number, stream)

        streams = range(1, min(count, self._streams))
        others = [self._threads.submit(work, stream) for stream in streams]
        try:
            work(0)
        finally:
            wait(others)
        for other in others:
            other.result()
        return [results[number] for number in range(count)]

    def close(self) -> None:
        """Free the compiled graphs; graphs still being compiled are freed afterwards."""
        self._is_closed = True
        self._threads.shutdown(cancel_futures=True)
        with self._lock:
            self._shapes.clear()

    def _compiled(self, size: tuple[int, int]) -> Future[CompiledShape]:
        """Return the graphs of a shape; begin to compile them if they are not known yet."""
        with self._lock:
            self._check_open()
            if size not in self._shapes:
                self._shapes[size] = Future()
                if len(self._shapes) > _COMPILED_SHAPES:
                    self._shapes.popitem(last=False)
                thread = threading.Thread(
                    target=self._compile,
                    args=(size, self._shapes[size]),
                    name="load graphs",
                    daemon=True,  # OpenVINO's compiler cannot be interrupted
                )
                mark_abandonable(thread)
                thread.start()
            self._shapes.move_to_end(size)
            return self._shapes[size]

    def _compile(self, size: tuple[int, int], compiled: Future[CompiledShape]) -> None:
        from maskcast.engines.openvino.streams import compile_shape

        try:
            with self._compiling:
                shape = compile_shape(
                    self._core,
                    self._models,
                    size,
                    streams=self._streams,
                    threads=self._threads_of_a_stream,
                    in_flight=_IN_FLIGHT * self.max_batch,
                    cache=self._cache,
                )
        except BaseException as error:
            compiled.set_exception(error)
        else:
            compiled.set_result(shape)


class _Release:
    """Holds the memory of an image's features until it is called; later calls do nothing."""

    def __init__(self, shape: CompiledShape) -> None:
        self.shape = shape
        self.features = shape.features.get()
        self._lock = threading.Lock()
        self._held = True

    def __call__(self) -> None:
        with self._lock:
            if self._held:
                self._held = False
                self.shape.features.put(self.features)
