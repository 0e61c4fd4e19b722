"""OpenVinoEngine: runs a bundle's portable graphs on the CPU."""

from __future__ import annotations

import os
import queue
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

from maskcast.engines.bundle import Bundle, FixedInput
from maskcast.engines.engine import Detections, Engine, Mode
from maskcast.engines.image import NetworkImage
from maskcast.engines.instances import MASK_SIZE, Instances
from maskcast.engines.result import keep_detections, to_instances

if TYPE_CHECKING:
    import openvino as ov

    from maskcast.engines.openvino.compiled import Request

T = TypeVar("T")

_IN_FLIGHT = 3
"""Batches that can wait for their masks: one in each of the two stages, and one between."""
_IMAGES_OF_A_STREAM = 2
"""In a batch: a stream that is done early takes another image while the others finish."""
_BOXES_AT_ONCE = (32, 16, 8, 4, 2, 1)
"""Numbers of boxes that the segmenter is compiled for; any other is a sum of them."""
_COMPILED_SHAPES = 8
"""Input shapes whose compiled graphs are kept, the latest used."""


def has_bf16() -> bool:
    """Tell whether this CPU computes in bfloat16."""
    import openvino as ov

    return "BF16" in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


class OpenVinoEngine(Engine):
    """Runs a bundle through OpenVINO on the CPU.

    Graphs are compiled, on a thread of their own, when a picture of a new shape comes or
    ``prepare`` asks for it, in about a second; the latest few shapes are kept.

    Args:
        bundle: of any backend; its portable graphs are read. In ``precision`` bf16 it computes in
            bfloat16, otherwise in fp32; what an int8 graph has quantised is computed in int8.
        mode: "latency" takes one image at a time and gives it all cores. "throughput" takes twice
            as many as there are cores and gives each one core: an image takes longer, but no core
            waits for the others at the end of a layer.
    """

    def __init__(self, bundle: Bundle, mode: Mode = "latency") -> None:
        import openvino as ov

        from maskcast.engines.openvino.operators import read_graph

        self.manifest = bundle.manifest
        precision = "f32"
        if bundle.manifest.precision == "bf16":
            precision = "bf16" if has_bf16() else "f32"
            if precision == "f32":
                warnings.warn("this CPU does not compute in bf16: fp32 is used", stacklevel=2)
        computes = {"bf16": precision.replace("f32", "fp32"), "int8": "int8"}
        self.device = f"OpenVINO CPU {computes.get(bundle.manifest.precision, 'fp32')}"
        self._streams = 1 if mode == "latency" else len(os.sched_getaffinity(0))
        self.max_batch = 1 if mode == "latency" else _IMAGES_OF_A_STREAM * self._streams
        # For the masks of one batch beside the boxes of the next. As each batch's first image runs
        # on its caller's thread, two are always left to compile.
        self._threads = ThreadPoolExecutor(2 * self._streams, "openvino")
        self._core = ov.Core()
        self._precision = precision
        self._detector = read_graph(bundle.detector)
        self._segmenter = None if bundle.segmenter is None else read_graph(bundle.segmenter)
        self._compiling = threading.Lock()
        self._shapes: OrderedDict[tuple[int, int], Future[_Shape]] = OrderedDict()
        self._lock = threading.Lock()
        shape = bundle.manifest.input
        if isinstance(shape, FixedInput):
            self._compiled((shape.height, shape.width)).result()

    def prepare(self, height: int, width: int) -> bool:
        """Begin to compile for a shape; see ``Engine.prepare``."""
        compiled = self._compiled((height, width))
        return compiled.done() and (compiled.exception() is not None or compiled.result().is_whole)

    def detect(self, images: Sequence[NetworkImage], min_score: float) -> Detections:
        """Find boxes; see ``Engine.detect``."""
        height, width = images[0].pixels.shape[:2]
        shape = self._compiled((height, width)).result()
        held = [_Release(shape, shape.requests.get()) for _ in images]

        def release() -> None:
            for one in held:
                one()

        def run(number: int, stream: int) -> None:
            image, request = images[number], held[number].request
            request.set_input("images", _tensor(image.pixels[None]))
            request.set_input("sizes", _tensor(np.array([image.content], np.float32)))
            request.infer()

        try:
            self._side_by_side(run, len(images))
            boxes, scores, labels = (
                np.concatenate([one.request.output(name).data for one in held])
                for name in ("boxes", "scores", "labels")
            )
            kept = keep_detections(boxes, scores, labels, min_score)
        except BaseException:
            release()
            raise
        return Detections(images=images, **kept, features=held, release=release)

    def segment(self, detections: Detections) -> list[Instances]:
        """Compute mask crops; see ``Engine.segment``."""
        held: list[_Release] = detections.features
        shape = held[0].shape

        def run(number: int, stream: int) -> NDArray[np.float32]:
            assert shape.segment is not None
            mine = detections.image_index == number
            boxes, labels = detections.boxes[mine], detections.labels[mine]
            return shape.segment(stream, held[number].request, boxes, labels)

        try:
            masks = None
            if shape.segment is not None:
                masks = np.concatenate(self._side_by_side(run, len(held)))
            return to_instances(detections, masks)
        finally:
            detections.release()

    def _side_by_side(self, run: Callable[[int, int], T], count: int) -> list[T]:
        """Call with 0 .. count - 1 and the number of the stream that has nothing else to do."""
        numbers = iter(range(count))
        results: dict[int, T] = {}

        def work(stream: int) -> None:
            for number in numbers:
                results[number] = run(number, stream)

        streams = range(1, min(count, self._streams))
        others = [self._threads.submit(work, stream) for stream in streams]
        work(0)
        for other in others:
            other.result()
        return [results[number] for number in range(count)]

    def close(self) -> None:
        """Free the compiled graphs. One that is being compiled goes when that is done."""
        self._threads.shutdown(cancel_futures=True)
        self._shapes.clear()

    def _compiled(self, size: tuple[int, int]) -> Future[_Shape]:
        """Return the graphs of a shape, which are being compiled if they were not yet."""
        with self._lock:
            if size not in self._shapes:
                self._shapes[size] = Future()
                if len(self._shapes) > _COMPILED_SHAPES:
                    self._shapes.popitem(last=False)
                threading.Thread(
                    target=self._compile,
                    args=(size, self._shapes[size]),
                    name="load graphs",
                    daemon=True,  # a compiler in C++ cannot be interrupted: nobody waits for it
                ).start()
            self._shapes.move_to_end(size)
            return self._shapes[size]

    def _compile(self, size: tuple[int, int], compiled: Future[_Shape]) -> None:
        try:
            with self._compiling:
                shape = _Shape(
                    self._core,
                    self._detector,
                    self._segmenter,
                    size,
                    self._precision,
                    self._streams,
                    self.max_batch,
                    self._threads,
                )
        except BaseException as error:
            compiled.set_exception(error)
        else:
            compiled.set_result(shape)


class _Shape:
    """Both graphs compiled for one input shape, and the requests that run them."""

    def __init__(
        self,
        core: ov.Core,
        detector: ov.Model,
        segmenter: ov.Model | None,
        size: tuple[int, int],
        precision: str,
        streams: int,
        max_batch: int,
        threads: Executor,
    ) -> None:
        from maskcast.engines.openvino.compiled import Graph, fix_detector

        self.segment = None
        if segmenter is not None:
            self.segment = _Segment(core, segmenter, size, precision, streams, threads)
        self.requests: queue.Queue[Request] = queue.Queue()
        compiled = Graph(core, fix_detector(detector, size), precision, streams)
        for _ in range(_IN_FLIGHT * max_batch):
            self.requests.put(compiled.request())

    @property
    def is_whole(self) -> bool:
        """Whether everything is compiled: the segmenter's graphs come last."""
        return self.segment is None or self.segment.is_compiled


class _Segment:
    """Runs the segmenter on any number of boxes, by graphs for a few numbers of them.

    They are compiled on other threads: whoever needs one waits for it.
    """

    def __init__(
        self,
        core: ov.Core,
        model: ov.Model,
        size: tuple[int, int],
        precision: str,
        streams: int,
        threads: Executor,
    ) -> None:
        from maskcast.engines.openvino.compiled import Graph, fix_segmenter

        def make(boxes: int) -> list[Request]:
            graph = Graph(core, fix_segmenter(model, size, boxes), precision, streams)
            return [graph.request() for _ in range(streams)]

        self._requests = {boxes: threads.submit(make, boxes) for boxes in _BOXES_AT_ONCE}

    @property
    def is_compiled(self) -> bool:
        """Whether no call will have to wait for a graph."""
        return all(made.done() for made in self._requests.values())

    def __call__(
        self, stream: int, detector: Request, boxes: NDArray[np.float32], labels: NDArray[np.int32]
    ) -> NDArray[np.float32]:
        """Compute mask crops ``[R, 28, 28]``; two calls at once must be of two streams."""
        from maskcast.engines.openvino.compiled import FEATURES

        masks = np.empty((len(boxes), MASK_SIZE, MASK_SIZE), np.float32)
        done = 0
        while done < len(boxes):
            count = next(number for number in _BOXES_AT_ONCE if number <= len(boxes) - done)
            request = self._requests[count].result()[stream]
            part = slice(done, done + count)
            request.set_input(FEATURES, detector.output(FEATURES))
            request.set_input("boxes", _tensor(boxes[part]))
            request.set_input("labels", _tensor(labels[part].astype(np.int64)))
            request.set_input("batch_index", _tensor(np.zeros(count, np.int32)))
            request.infer()
            masks[part] = request.output("masks").data
            done += count
        return masks


class _Release:
    """Holds a detector's request, with the features in it, until called: once or more."""

    def __init__(self, shape: _Shape, request: Request) -> None:
        self.shape = shape
        self.request = request
        self._lock = threading.Lock()
        self._held = True

    def __call__(self) -> None:
        with self._lock:
            if self._held:
                self._held = False
                self.shape.requests.put(self.request)


def _tensor(array: NDArray[np.generic]) -> ov.Tensor:
    import openvino as ov

    return ov.Tensor(np.ascontiguousarray(array))
