"""OnnxRuntimeEngine: runs a bundle's portable graphs unchanged, on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from maskcast.engines.bundle import Bundle
from maskcast.engines.engine import Detections, Engine, keep_detections, to_instances
from maskcast.engines.errors import InputError
from maskcast.engines.image import NetworkImage
from maskcast.engines.instances.instances import MASK_SIZE, Instances
from maskcast.engines.instances.keypoints import HEATMAP_SIZE, decode_heatmaps
from maskcast.engines.onnx_file import is_quantised

if TYPE_CHECKING:
    import onnxruntime

_FEATURES = ("p2", "p3", "p4", "p5")


class OnnxRuntimeEngine(Engine):
    """Runs a bundle through ONNX Runtime, which uses the function bodies of maskcast's operators.

    It is slower than OpenVINO. It is the reference: it shows that the graphs are self-contained.

    Args:
        bundle: of any backend; its portable graphs are run in fp32, or in int8 where they are
            quantised.
        pose: load the poser too.

    Raises:
        InputError: onnxruntime is not installed, or a graph cannot be loaded.
    """

    max_batch = 8

    def __init__(self, bundle: Bundle, *, pose: bool = False) -> None:
        self.manifest = bundle.manifest
        precision = "int8" if is_quantised(bundle.detector) else "fp32"
        self.device = f"ONNX Runtime CPU {precision}"
        self._detector = _session(bundle.detector)
        self._segmenter = None if bundle.segmenter is None else _session(bundle.segmenter)
        self._poser = _session(bundle.poser) if pose and bundle.poser is not None else None
        self.has_pose = self._poser is not None

    def detect(self, images: Sequence[NetworkImage], min_score: float) -> Detections:
        """Find boxes; see ``Engine.detect``."""
        self._check_open()
        self._check_batch(images)
        pixels = np.stack([image.pixels for image in images])
        inputs = {
            "images": np.ascontiguousarray(pixels.transpose(0, 3, 1, 2), np.float32),
            "sizes": np.array([image.content for image in images], np.float32),
        }
        outputs = ("boxes", "scores", "labels", *_FEATURES)
        boxes, scores, labels, *features = self._detector.run(outputs, inputs)
        return Detections(
            images=images,
            **keep_detections(boxes, scores, labels, min_score),
            features=dict(zip(_FEATURES, features, strict=True)),
            release=lambda: None,
        )

    def estimate_pose(self, detections: Detections) -> Detections:
        """Find keypoints; see ``Engine.estimate_pose``."""
        keypoints = self.manifest.keypoints
        if self._poser is None or keypoints is None:
            return super().estimate_pose(detections)
        self._check_open()
        heatmaps = np.zeros((0, len(keypoints), HEATMAP_SIZE, HEATMAP_SIZE), np.float32)
        if len(detections.boxes):
            inputs = {"boxes": detections.boxes, "batch_index": detections.image_index}
            (heatmaps,) = self._poser.run(("heatmaps",), detections.features | inputs)
        points = decode_heatmaps(heatmaps, detections.boxes, self.manifest.keypoint_blur_cells)
        return replace(detections, keypoints=points)

    def segment(self, detections: Detections) -> list[Instances]:
        """Compute mask crops; see ``Engine.segment``."""
        self._check_open()
        if self._segmenter is None:
            return to_instances(detections, None)
        masks = np.zeros((len(detections.boxes), MASK_SIZE, MASK_SIZE), np.float32)
        if len(masks):
            (masks,) = self._segmenter.run(
                ("masks",),
                detections.features
                | {
                    "boxes": detections.boxes,
                    "labels": detections.labels.astype(np.int64),
                    "batch_index": detections.image_index,
                },
            )
        return to_instances(detections, masks)

    def close(self) -> None:
        """Refuse further calls; the sessions are freed with the engine."""
        self._is_closed = True


def _session(graph: Path) -> onnxruntime.InferenceSession:
    try:
        import onnxruntime
    except ImportError:
        raise InputError(
            "onnxruntime is not installed: pip install 'maskcast[onnxruntime]', or use openvino"
        ) from None
    try:
        return onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exception classes have no common base
        reason = str(error).partition("\n")[0][:200]
        raise InputError(
            f"{graph}: ONNX Runtime cannot load this graph ({reason}); build the bundle again"
        ) from None
