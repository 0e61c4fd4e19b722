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
    """Accuracy of the detections above a score threshold.

    Attributes:
        threshold: minimum score, 0..1.
        precision: share of the detections that are correct, 0..1; None without a detection.
        recall: share of the annotated instances that are detected, 0..1; None without an instance.
        false_per_image: false positives per image, over all images.
    """

    threshold: float
    precision: float | None
    recall: float | None
    false_per_image: float


def measure_operating_point(
    annotations: Sequence[Record], results: Sequence[Record], images: int, threshold: float
) -> OperatingPoint:
    """Count true and false positives at a score threshold.

    Detections of an image and category are matched in descending order of score. One is correct if
    the IoU of its box with that of an unmatched instance is at least 0.5; it is matched with the
    one that it overlaps most. A false positive is not counted if at least half of its box lies in a
    crowd (``iscrowd``). Crowds do not count as instances.

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
    correct = false = 0
    for key, detections in found.items():
        counts = _match(truth[key], detections)
        correct += counts[0]
        false += counts[1]
    return {
        "threshold": threshold,
        "precision": correct / (correct + false) if correct + false else None,
        "recall": correct / instances if instances else None,
        "false_per_image": false / images if images else 0.0,
    }


def _match(annotations: list[Record], detections: list[Record]) -> tuple[int, int]:
    """Count the true and false positives of one image and category."""
    instances = _boxes([a for a in annotations if not a.get("iscrowd")])
    crowds = _boxes([a for a in annotations if a.get("iscrowd")])
    boxes = _boxes(sorted(detections, key=lambda d: d["score"], reverse=True))
    shared = _intersections(boxes, instances)
    overlaps = _ratio(shared, _areas(boxes)[:, None] + _areas(instances) - shared)
    in_crowds = _ratio(_intersections(boxes, crowds), _areas(boxes)[:, None])
    correct = false = 0
    for overlap, in_crowd in zip(overlaps, in_crowds, strict=True):
        if len(overlap) and overlap.max() >= _MATCH_IOU:
            overlaps[:, overlap.argmax()] = 0  # matched
            correct += 1
        elif not (in_crowd >= _MATCH_IOU).any():
            false += 1
    return correct, false


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
