"""Operating point: precision, recall and false alarms of a predictor at one score threshold."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

Record = dict[str, Any]
"""An annotation or a result in COCO's form: ``image_id``, ``category_id``, ``bbox`` (x, y, width,
height in pixels), and ``iscrowd`` or ``score``."""

_MATCH_IOU = 0.5


class OperatingPoint(TypedDict):
    """What a user of one score threshold gets.

    Attributes:
        threshold: minimum score, 0..1.
        precision: share of the detections that are right, 0..1; None without a detection.
        recall: share of the annotated instances that are found, 0..1; None without an instance.
        false_per_image: wrong detections per image, over all images.
    """

    threshold: float
    precision: float | None
    recall: float | None
    false_per_image: float


def measure_operating_point(
    annotations: Sequence[Record], results: Sequence[Record], images: int, threshold: float
) -> OperatingPoint:
    """Count right and wrong detections at a score threshold.

    Detections of an image and category are matched in descending order of score. One is right if
    the IoU of its box with that of an instance that is not matched yet is at least 0.5; it takes
    the one it overlaps most. A wrong one of which at least half lies in a crowd (``iscrowd``) is
    not counted; a crowd is no instance to be found.

    Args:
        annotations: all instances and crowds of the images.
        results: all detections in the images, of any score.
        images: number of images, those without annotations included.
        threshold: minimum score, 0..1.
    """
    truth: defaultdict[tuple[int, int], list[Record]] = defaultdict(list)
    for annotation in annotations:
        truth[annotation["image_id"], annotation["category_id"]].append(annotation)
    found: defaultdict[tuple[int, int], list[Record]] = defaultdict(list)
    for result in results:
        if result["score"] >= threshold:
            found[result["image_id"], result["category_id"]].append(result)
    instances = sum(not annotation.get("iscrowd") for annotation in annotations)
    right = wrong = 0
    for key, detections in found.items():
        matched, false = _match(truth[key], detections)
        right += matched
        wrong += false
    return {
        "threshold": threshold,
        "precision": right / (right + wrong) if right + wrong else None,
        "recall": right / instances if instances else None,
        "false_per_image": wrong / images if images else 0.0,
    }


def _match(annotations: list[Record], detections: list[Record]) -> tuple[int, int]:
    """Count the right and the wrong among the detections of one image and category."""
    instances = _boxes([a for a in annotations if not a.get("iscrowd")])
    crowds = _boxes([a for a in annotations if a.get("iscrowd")])
    boxes = _boxes(sorted(detections, key=lambda d: d["score"], reverse=True))
    shared = _intersections(boxes, instances)
    overlaps = _ratio(shared, _areas(boxes)[:, None] + _areas(instances) - shared)
    in_crowds = _ratio(_intersections(boxes, crowds), _areas(boxes)[:, None])
    right = wrong = 0
    for overlap, in_crowd in zip(overlaps, in_crowds, strict=True):
        if len(overlap) and overlap.max() >= _MATCH_IOU:
            overlaps[:, overlap.argmax()] = 0  # taken
            right += 1
        elif not (in_crowd >= _MATCH_IOU).any():
            wrong += 1
    return right, wrong


def _boxes(records: list[Record]) -> NDArray[np.float64]:
    return np.array([record["bbox"] for record in records], np.float64).reshape(-1, 4)


def _areas(boxes: NDArray[np.float64]) -> NDArray[np.float64]:
    areas: NDArray[np.float64] = boxes[:, 2] * boxes[:, 3]
    return areas


def _intersections(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """Compute the areas shared by boxes ``[N, 4]`` and ``[M, 4]``, xywh: ``[N, M]``."""
    start = np.maximum(a[:, None, :2], b[:, :2])
    stop = np.minimum(a[:, None, :2] + a[:, None, 2:], b[:, :2] + b[:, 2:])
    shared: NDArray[np.float64] = (stop - start).clip(0).prod(2)
    return shared


def _ratio(part: NDArray[np.float64], whole: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.divide(part, whole, out=np.zeros_like(part), where=whole > 0)
