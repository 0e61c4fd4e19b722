"""Overlap: intersection over union of masks, computed from their 28 x 28 crops."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from maskcast.engines.instances.instances import Instances
from maskcast.engines.instances.masks import HALF, MASK_SIZE

SAMPLES = 12
"""Two masks are compared at a grid of this many points per side in their boxes' intersection."""


def binary_crops(instances: Instances) -> NDArray[np.uint8]:
    """Return the masks as crops of 0 and 1: ``[N, 28, 28]`` uint8; all 1 without masks."""
    if isinstance(instances.masks, np.ndarray):
        return (instances.masks > HALF).view(np.uint8)
    return np.ones((len(instances), MASK_SIZE, MASK_SIZE), np.uint8)


def mask_areas(crops: NDArray[np.uint8], boxes: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the area of each mask in square pixels: ``[N]``.

    Args:
        crops: ``[N, 28, 28]`` uint8, 0 or 1.
        boxes: ``[N, 4]`` x1 y1 x2 y2 in pixels.
    """
    sides = boxes[:, 2:] - boxes[:, :2]
    shares = crops.reshape(len(crops), -1).sum(axis=1, dtype=np.int64) / MASK_SIZE**2
    areas: NDArray[np.float64] = shares * sides[:, 0] * sides[:, 1]
    return areas


def mask_iou(
    crops_a: NDArray[np.uint8],
    boxes_a: NDArray[np.float64],
    crops_b: NDArray[np.uint8],
    boxes_b: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Return the intersection over union of each mask of a with each of b: ``[A, B]``, 0 to 1.

    Pairs whose boxes do not intersect are skipped; the others are compared at 12 x 12 points in
    the intersection of their boxes. Full-size masks are not needed.

    Args:
        crops_a: ``[A, 28, 28]`` uint8, 0 or 1.
        boxes_a: ``[A, 4]`` x1 y1 x2 y2 in pixels; may lie outside the frame.
        crops_b: as ``crops_a``, ``[B, 28, 28]``.
        boxes_b: as ``boxes_a``, ``[B, 4]``.
    """
    iou = np.zeros((len(boxes_a), len(boxes_b)))
    if not iou.size:
        return iou
    low = np.maximum(boxes_a[:, None, :2], boxes_b[None, :, :2])
    high = np.minimum(boxes_a[:, None, 2:], boxes_b[None, :, 2:])
    a, b = np.nonzero((high > low).all(axis=2))
    if not len(a):
        return iou
    low, high = low[a, b], high[a, b]
    steps = (np.arange(SAMPLES) + 0.5) / SAMPLES
    points = low[:, None] + steps[None, :, None] * (high - low)[:, None]  # [P, samples, x y]
    both = _cells(crops_a, boxes_a, a, points) & _cells(crops_b, boxes_b, b, points)
    common = both.sum(axis=1, dtype=np.int64) / SAMPLES**2 * np.prod(high - low, axis=1)
    union = mask_areas(crops_a, boxes_a)[a] + mask_areas(crops_b, boxes_b)[b] - common
    iou[a, b] = np.minimum(np.divide(common, union, out=np.zeros_like(common), where=union > 0), 1)
    return iou


def _cells(
    crops: NDArray[np.uint8],
    boxes: NDArray[np.float64],
    which: NDArray[np.intp],
    points: NDArray[np.float64],
) -> NDArray[np.uint8]:
    """Look up the cells of crops under a grid of points: ``[P, samples x samples]``."""
    box = boxes[which]
    scale = MASK_SIZE / (box[:, 2:] - box[:, :2])
    cell = ((points - box[:, None, :2]) * scale[:, None]).astype(np.int64)
    np.minimum(cell, MASK_SIZE - 1, out=cell)
    first = which * MASK_SIZE**2
    flat = (first[:, None] + cell[:, :, 1] * MASK_SIZE)[:, :, None] + cell[:, None, :, 0]
    return crops.reshape(-1).take(flat.reshape(len(which), -1))
