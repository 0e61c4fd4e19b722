"""OpenVinoEngine: runs a bundle's portable graphs on the CPU."""

from __future__ import annotations

import queue
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from engines.bundle import Bundle
from engines.engine import Detections, Engine
from engines.image import NetworkImage
from engines.instances import Instances
from engines.result import keep_detections, to_instances

if TYPE_CHECKING:
    import openvino as ov

_FEATURES = ("p2", "p3", "p4", "p5")
_IN_FLIGHT = 3
"""Detections that may wait for their masks: one in each of the two stages, one between them."""
_COMPILED_SHAPES = 4
"""Input shapes whose compiled graphs are kept."""


class OpenVinoEngine(Engine):
    """Runs a bundle through OpenVINO on the CPU.

    Args:
        bundle: of any backend; its portable graphs are read.
    """

    def __init__(self, bundle: Bundle) -> None:
        import openvino as ov

        from engines.openvino_operators import pool_by_level, pool_by_table, read_graph

        self.manifest = bundle.manifest
        self.max_batch = 1
        self._core = ov.Core()
        precision = "bf16" if bundle.manifest.precision == "bf16" else "f32"
        self._options = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": precision,
        }
        self.device = f"OpenVINO CPU {'bf16' if precision == 'bf16' else 'fp32'}"
        self._detector = read_graph(bundle.detector, pool_by_table)
        self._segmenter = (
            None if bundle.segmenter is None else read_graph(bundle.segmenter, pool_by_level)
        )
        self._compiled: OrderedDict[tuple[int, int], _Compiled] = OrderedDict()
        self._compiling = threading.Lock()

    def detect(self, images: Sequence[NetworkImage], min_score: float) -> Detections:
        """Find boxes in one image; see ``Engine.detect``."""
        (image,) = images
        compiled = self._compile(image.pixels.shape[:2])
        request = compiled.requests.get()
        try:
            request.set_tensor("images", _tensor(image.pixels[None]))
            request.set_tensor("sizes", _tensor(np.array([image.content], np.float32)))
            request.infer()
            kept = keep_detections(
                *(request.get_tensor(name).data for name in ("boxes", "scores", "labels")),
                min_score,
            )
        except BaseException:
            compiled.requests.put(request)
            raise
        lock = threading.Lock()
        held = [request]

        def release() -> None:
            with lock:
                if held:
                    compiled.requests.put(held.pop())

        return Detections(images=images, **kept, features=(compiled, request), release=release)

    def segment(self, detections: Detections) -> list[Instances]:
        """Compute mask crops; see ``Engine.segment``."""
        try:
            masks = None
            compiled, request = detections.features
            if compiled.segmenter is not None:
                masks = np.zeros((len(detections.boxes), 28, 28), np.float32)
                if len(masks):
                    segment = compiled.segmenter
                    for name in _FEATURES:
                        segment.set_tensor(name, request.get_tensor(name))
                    segment.set_tensor("boxes", _tensor(detections.boxes))
                    segment.set_tensor("labels", _tensor(detections.labels.astype(np.int64)))
                    segment.set_tensor("batch_index", _tensor(detections.image_index))
                    segment.infer()
                    masks = segment.get_tensor("masks").data
            return to_instances(detections, masks)
        finally:
            detections.release()

    def close(self) -> None:
        """Free the compiled graphs."""
        self._compiled.clear()

    def _compile(self, shape: tuple[int, int]) -> _Compiled:
        with self._compiling:
            if shape not in self._compiled:
                if len(self._compiled) >= _COMPILED_SHAPES:
                    self._compiled.popitem(last=False)
                self._compiled[shape] = _Compiled(self, shape)
            self._compiled.move_to_end(shape)
            return self._compiled[shape]


class _Compiled:
    def __init__(self, engine: OpenVinoEngine, shape: tuple[int, int]) -> None:
        import openvino as ov
        from openvino.preprocess import PrePostProcessor

        height, width = shape
        model = engine._detector.clone()
        model.reshape({"images": [1, 3, height, width], "sizes": [1, 2]})
        steps = PrePostProcessor(model)
        images = steps.input("images")
        images.tensor().set_element_type(ov.Type.u8).set_layout(ov.Layout("NHWC"))
        images.model().set_layout(ov.Layout("NCHW"))
        images.preprocess().convert_element_type(ov.Type.f32)
        detector = engine._core.compile_model(steps.build(), "CPU", engine._options)
        self.requests: queue.Queue[Any] = queue.Queue()
        for _ in range(_IN_FLIGHT):
            self.requests.put(detector.create_infer_request())
        self.segmenter = None
        if engine._segmenter is not None:
            model = engine._segmenter.clone()
            shapes = {name: list(detector.output(name).shape) for name in _FEATURES}
            model.reshape(shapes | {"boxes": [-1, 4], "labels": [-1], "batch_index": [-1]})
            compiled = engine._core.compile_model(model, "CPU", engine._options)
            self.segmenter = compiled.create_infer_request()


def _tensor(array: Any) -> ov.Tensor:
    import openvino as ov

    return ov.Tensor(np.ascontiguousarray(array), shared_memory=True)
