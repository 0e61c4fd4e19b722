"""OpenVinoEngine: runs a bundle's portable graphs on the CPU."""

from __future__ import annotations

import queue
import threading
import warnings
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from engines.bundle import Bundle, FixedInput
from engines.engine import Detections, Engine
from engines.image import NetworkImage
from engines.instances import MASK_SIZE, Instances
from engines.result import keep_detections, to_instances

if TYPE_CHECKING:
    import openvino as ov

    from engines.openvino_graph import Graph, Request

_IN_FLIGHT = 3
"""Detections that can wait for their masks: one in each of the two stages, and one between."""
_COMPILED_SHAPES = 4
"""Input shapes whose compiled graphs are kept, the latest used."""


def has_bf16() -> bool:
    """Tell whether this CPU computes in bfloat16."""
    import openvino as ov

    return "BF16" in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


class OpenVinoEngine(Engine):
    """Runs a bundle through OpenVINO on the CPU, one image at a time.

    Graphs are compiled when a picture of a new shape comes, in about a second; the latest
    few shapes are kept.

    Args:
        bundle: of any backend; its portable graphs are read. In ``precision`` bf16 it computes in
            bfloat16, otherwise in fp32.
    """

    max_batch = 1

    def __init__(self, bundle: Bundle) -> None:
        import openvino as ov

        from engines.openvino_operators import pool_by_level, pool_by_table, read_graph

        self.manifest = bundle.manifest
        precision = "f32"
        if bundle.manifest.precision == "bf16":
            precision = "bf16" if has_bf16() else "f32"
            if precision == "f32":
                warnings.warn("this CPU does not compute in bf16: fp32 is used", stacklevel=2)
        self.device = f"OpenVINO CPU {'bf16' if precision == 'bf16' else 'fp32'}"
        self._core = ov.Core()
        self._precision = precision
        self._detector = read_graph(bundle.detector, pool_by_table)
        self._segmenter = (
            None if bundle.segmenter is None else read_graph(bundle.segmenter, pool_by_level)
        )
        self._shapes: OrderedDict[tuple[int, int], _Shape] = OrderedDict()
        shape = bundle.manifest.input
        if isinstance(shape, FixedInput):
            self._compiled((shape.height, shape.width))

    def detect(self, images: Sequence[NetworkImage], min_score: float) -> Detections:
        """Find boxes in one image; see ``Engine.detect``."""
        (image,) = images
        height, width = image.pixels.shape[:2]
        shape = self._compiled((height, width))
        request = shape.requests.get()
        release = _Release(shape, request)
        try:
            request.set_input("images", _tensor(image.pixels[None]))
            request.set_input("sizes", _tensor(np.array([image.content], np.float32)))
            request.infer()
            boxes, scores, labels = (
                request.output(name).data for name in ("boxes", "scores", "labels")
            )
            kept = keep_detections(boxes, scores, labels, min_score)
        except BaseException:
            release()
            raise
        return Detections(images=images, **kept, features=release, release=release)

    def segment(self, detections: Detections) -> list[Instances]:
        """Compute mask crops; see ``Engine.segment``."""
        held: _Release = detections.features
        try:
            masks = None
            if held.shape.segment is not None:
                masks = held.shape.segment(held.request, detections)
            return to_instances(detections, masks)
        finally:
            held()

    def close(self) -> None:
        """Free the compiled graphs."""
        self._shapes.clear()

    def _compiled(self, size: tuple[int, int]) -> _Shape:
        if size not in self._shapes:
            self._shapes[size] = _Shape(
                self._core, self._detector, self._segmenter, size, self._precision
            )
            if len(self._shapes) > _COMPILED_SHAPES:
                self._shapes.popitem(last=False)
        self._shapes.move_to_end(size)
        return self._shapes[size]


class _Shape:
    """Both graphs compiled for one input shape, and the requests that run the detector."""

    def __init__(
        self,
        core: ov.Core,
        detector: ov.Model,
        segmenter: ov.Model | None,
        size: tuple[int, int],
        precision: str,
    ) -> None:
        from engines.openvino_graph import Graph, fix_detector, fix_segmenter

        self.requests: queue.Queue[Request] = queue.Queue()
        compiled = Graph(core, fix_detector(detector, size), precision)
        for _ in range(_IN_FLIGHT):
            self.requests.put(compiled.request())
        self.segment = None
        if segmenter is not None:
            self.segment = _Segment(Graph(core, fix_segmenter(segmenter, size), precision))


class _Segment:
    """Runs the segmenter; the number of boxes is another one each time."""

    def __init__(self, graph: Graph) -> None:
        self._request = graph.request()

    def __call__(self, detector: Request, detections: Detections) -> NDArray[np.float32]:
        from engines.openvino_graph import FEATURES

        if len(detections.boxes) == 0:
            return np.zeros((0, MASK_SIZE, MASK_SIZE), np.float32)
        for name in FEATURES:
            self._request.set_input(name, detector.output(name))
        self._request.set_input("boxes", _tensor(detections.boxes))
        self._request.set_input("labels", _tensor(detections.labels.astype(np.int64)))
        self._request.set_input("batch_index", _tensor(detections.image_index))
        self._request.infer()
        masks: NDArray[np.float32] = self._request.output("masks").data
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
