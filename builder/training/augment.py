"""Augmentation of training examples: pure functions of arrays and a random generator."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

Pixels = npt.NDArray[np.uint8]

# Instances that are smaller than this after a crop, in pixels, are dropped.
_MIN_SIDE = 4
_MIN_AREA = 20
# An instance behind a pasted one is dropped unless more than this share of its mask is visible. A
# box does not show which pixels are the instance: less than this share of it may be covered.
_MIN_VISIBLE = 0.1
_MAX_COVERED = 0.6


class Example(NamedTuple):
    """An image and its instances.

    Attributes:
        image: uint8 ``[H, W, 3]``, RGB.
        boxes: float32 ``[N, 4]``, xyxy pixels.
        labels: int64 ``[N]``, from 1.
        masks: uint8 ``[N, H, W]``, 0 or 1; empty for an instance that has only a box; None if none
            of the annotations has a mask.
        keypoints: float32 ``[N, K, 3]``, x and y in pixels, and above 0 where a point is known;
            None if no keypoints are learned.
    """

    image: Pixels
    boxes: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]
    masks: Pixels | None
    keypoints: npt.NDArray[np.float32] | None = None


def resize(example: Example, width: int, height: int) -> Example:
    """Resize to exactly ``width`` x ``height``: pixels bilinear (antialiased), masks nearest."""
    old_height, old_width = example.image.shape[:2]
    if (old_width, old_height) == (width, height):
        return example
    image = Image.fromarray(example.image).resize((width, height), Image.Resampling.BILINEAR)
    masks = example.masks
    if masks is not None:
        rows = _nearest_index(old_height, height)
        columns = _nearest_index(old_width, width)
        masks = masks[:, rows[:, None], columns[None, :]]
    scale = np.array([width / old_width, height / old_height] * 2, np.float32)
    keypoints = example.keypoints
    if keypoints is not None:
        keypoints = keypoints * np.append(scale[:2], np.float32(1))
    return Example(np.asarray(image), example.boxes * scale, example.labels, masks, keypoints)


def _nearest_index(old: int, new: int) -> npt.NDArray[np.intp]:
    index: npt.NDArray[np.intp] = ((np.arange(new) + 0.5) * old / new).astype(np.intp)
    return index


def crop(example: Example, left: int, top: int, size: int, fill: int = 127) -> Example:
    """Crop a ``size`` x ``size`` square; pixels outside the image are ``fill``.

    Boxes are clipped; those of instances with masks are recomputed from the cropped masks.
    Instances of which too little is left are dropped. Keypoints outside the crop become unknown.
    """
    image = np.full((size, size, 3), fill, np.uint8)
    window = example.image[top : top + size, left : left + size]
    image[: window.shape[0], : window.shape[1]] = window
    boxes = example.boxes - np.array([left, top, left, top], np.float32)
    limit = np.array([window.shape[1], window.shape[0]] * 2, np.float32)
    boxes = np.clip(boxes, 0, limit)
    masks = None
    area = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    if example.masks is not None:
        masks = np.zeros((len(boxes), size, size), np.uint8)
        cut = example.masks[:, top : top + size, left : left + size]
        masks[:, : cut.shape[1], : cut.shape[2]] = cut
        masked = example.masks.any(axis=(1, 2))
        boxes[masked] = boxes_of_masks(masks[masked])
        area[masked] = masks[masked].sum(axis=(1, 2), dtype=np.int64)
    sides = boxes[:, 2:] - boxes[:, :2]
    keep = (sides >= _MIN_SIDE).all(axis=1) & (area >= _MIN_AREA)
    keypoints = example.keypoints
    if keypoints is not None:
        keypoints = keypoints[keep] - np.array([left, top, 0], np.float32)
        is_inside = (keypoints[..., :2] >= 0) & (keypoints[..., :2] < limit[:2])
        keypoints[..., 2] *= is_inside.all(axis=2)
    masks = None if masks is None else masks[keep]
    return Example(image, boxes[keep], example.labels[keep], masks, keypoints)


def boxes_of_masks(masks: Pixels) -> npt.NDArray[np.float32]:
    """Return the tightest boxes ``[N, 4]`` around masks ``[N, H, W]``; zeros for an empty mask."""
    boxes = np.zeros((len(masks), 4), np.float32)
    for box, mask in zip(boxes, masks, strict=True):
        columns = np.flatnonzero(mask.any(axis=0))
        rows = np.flatnonzero(mask.any(axis=1))
        if len(columns):
            box[:] = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
    return boxes


def flip(example: Example, mirrored: Sequence[int] = ()) -> Example:
    """Mirror left and right; ``mirrored`` is the index of each keypoint's counterpart."""
    width = example.image.shape[1]
    boxes = example.boxes.copy()
    boxes[:, [0, 2]] = width - boxes[:, [2, 0]]
    masks = None if example.masks is None else example.masks[:, :, ::-1]
    keypoints = example.keypoints
    if keypoints is not None:
        keypoints = keypoints[:, list(mirrored)]
        keypoints[..., 0] = width - keypoints[..., 0]
    return Example(example.image[:, ::-1], boxes, example.labels, masks, keypoints)


def paste(example: Example, other: Example, chosen: npt.NDArray[np.bool_]) -> Example:
    """Paste the chosen instances of another example of the same size over this one.

    Copy-paste (Ghiasi et al. 2021, section 3) without blending. The covered pixels are removed from
    this example's masks, and instances of which too little is left are dropped. Instances that have
    only a box keep it; their masks are empty and do not enter the loss. Covered keypoints become
    unknown.

    Args:
        example: of size ``[H, W]``.
        other: of the same size, with a mask of every instance; both or neither have keypoints.
        chosen: bool ``[M]``, instances of ``other`` to paste.
    """
    assert other.masks is not None
    pasted = other.masks[chosen]
    cover = np.logical_or.reduce(pasted.astype(bool), axis=0)
    image = np.where(cover[..., None], other.image, example.image)
    masks = example.masks
    if masks is None:
        masks = np.zeros((len(example.boxes), *cover.shape), np.uint8)
    left = masks * ~cover
    before = masks.sum(axis=(1, 2), dtype=np.int64)
    after = left.sum(axis=(1, 2), dtype=np.int64)
    keep = (after >= _MIN_AREA) & (after > _MIN_VISIBLE * before)
    unmasked = before == 0
    keep[unmasked] = [_is_visible(cover, box) for box in example.boxes[unmasked]]
    left = left[keep]
    boxes = np.where(unmasked[keep, None], example.boxes[keep], boxes_of_masks(left))
    return Example(
        image,
        np.concatenate([boxes, other.boxes[chosen]]),
        np.concatenate([example.labels[keep], other.labels[chosen]]),
        np.concatenate([left, pasted]),
        _paste_keypoints(example, other, keep, chosen, cover),
    )


def _paste_keypoints(
    example: Example,
    other: Example,
    keep: npt.NDArray[np.bool_],
    chosen: npt.NDArray[np.bool_],
    cover: npt.NDArray[np.bool_],
) -> npt.NDArray[np.float32] | None:
    if example.keypoints is None or other.keypoints is None:
        return None
    keypoints = example.keypoints[keep]
    limit = np.array(cover.shape)[::-1] - 1
    x, y = np.moveaxis(keypoints[..., :2].astype(np.intp).clip(0, limit), 2, 0)
    keypoints[..., 2] *= ~cover[y, x]
    return np.concatenate([keypoints, other.keypoints[chosen]])


def _is_visible(cover: npt.NDArray[np.bool_], box: npt.NDArray[np.float32]) -> bool:
    """Return whether enough of a box is visible behind the pasted instances."""
    left, top, right, bottom = (int(side) for side in box)
    return bool(cover[top : bottom + 1, left : right + 1].mean() < _MAX_COVERED)


def jitter_colour(image: Pixels, rng: np.random.Generator, strength: float = 0.3) -> Pixels:
    """Vary brightness, contrast and saturation by factors within 1 ± ``strength``."""
    brightness, contrast, saturation = rng.uniform(1 - strength, 1 + strength, 3)
    pixels = image.astype(np.float32) * np.float32(brightness)
    grey = pixels @ np.array([0.299, 0.587, 0.114], np.float32)
    pixels = grey[..., None] + np.float32(saturation) * (pixels - grey[..., None])
    pixels = grey.mean() + np.float32(contrast) * (pixels - grey.mean())
    varied: Pixels = np.clip(pixels, 0, 255).astype(np.uint8)
    return varied


def random_canvas(
    example: Example, canvas: int, scales: tuple[float, float], rng: np.random.Generator
) -> Example:
    """Resize and crop a square at random, so that all examples of a batch have one shape.

    Args:
        example: to crop from.
        canvas: side of the square, pixels.
        scales: range of the longer side before the crop, relative to ``canvas``.
        rng: random generator.
    """
    height, width = example.image.shape[:2]
    scale = np.exp(rng.uniform(*np.log(scales))) * canvas / max(height, width)
    width, height = max(1, round(width * scale)), max(1, round(height * scale))
    left = int(rng.integers(0, max(0, width - canvas) + 1))
    top = int(rng.integers(0, max(0, height - canvas) + 1))
    return crop(resize(example, width, height), left, top, canvas)


def random_shorter_side(
    example: Example, sides: tuple[int, int], longest: int, rng: np.random.Generator
) -> Example:
    """Resize the shorter side into ``sides`` (inclusive), the longer to ``longest`` at most."""
    height, width = example.image.shape[:2]
    side = int(rng.integers(sides[0], sides[1] + 1))
    scale = min(side / min(height, width), longest / max(height, width))
    return resize(example, max(1, round(width * scale)), max(1, round(height * scale)))
