"""What every engine does with a graph's outputs: which boxes are kept, and the way back."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from maskcast.engines.engine import Detections
from maskcast.engines.instances import Instances


def keep_detections(
    boxes: NDArray[np.float32],
    scores: NDArray[np.float32],
    labels: NDArray[np.int64],
    min_score: float,
) -> dict[str, NDArray[Any]]:
    """Take what scores ``min_score`` up out of a detector's padded outputs.

    Args:
        boxes: ``[B, D, 4]``.
        scores: ``[B, D]``, descending; 0 where there is no box.
        labels: ``[B, D]``; 0 where there is no box.
        min_score: 0..1.

    Returns:
        ``boxes``, ``scores``, ``labels`` and ``image_index`` of ``Detections``.
    """
    kept = (labels > 0) & (scores >= min_score)
    return {
        "boxes": boxes[kept],
        "scores": scores[kept],
        "labels": labels[kept].astype(np.int32),
        "image_index": np.nonzero(kept)[0].astype(np.int32),
    }


def to_instances(detections: Detections, masks: NDArray[np.float32] | None) -> list[Instances]:
    """Bring a batch's boxes back to source pixels and its masks to uint8.

    Args:
        detections: of the batch.
        masks: ``[R, 28, 28]`` in 0..1; None without a mask branch.
    """
    crops = None if masks is None else np.rint(masks * 255).astype(np.uint8)
    found = []
    for number, image in enumerate(detections.images):
        mine = detections.image_index == number
        height, width = image.source
        scale = np.array([width / image.content[1], height / image.content[0]] * 2, np.float32)
        limit = np.array([width, height] * 2, np.float32)
        found.append(
            Instances(
                width=width,
                height=height,
                boxes=np.clip(detections.boxes[mine] * scale, 0, limit),
                scores=detections.scores[mine],
                labels=detections.labels[mine],
                masks=None if crops is None else crops[mine],
            )
        )
    return found
