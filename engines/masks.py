"""Masks: a 28x28 crop of probabilities becomes pixels, COCO runs or bits.

The masks of a frame leave the network as small crops and stay so. What is made here is made of one
instance at a time and only as large as its box: a full-size picture never exists on the way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

MASK_SIZE = 28
"""Side of a mask crop in cells: the mask head's output (He et al., Mask R-CNN, figure 4)."""

HALF = 127.5
"""Probability 0.5 on the scale of a uint8 crop: what lies above is the object."""

PACKED_BYTES = MASK_SIZE * MASK_SIZE // 8
"""Bytes of a crop at one bit a cell."""


class Patch(NamedTuple):
    """The box-sized part of a mask.

    Attributes:
        x0, y0: the picture's pixel under ``pixels[0, 0]``.
        pixels: ``[h, w]`` bool; nothing of the object lies outside. May be empty.
    """

    x0: int
    y0: int
    pixels: NDArray[np.bool_]


class MaskGrid(NamedTuple):
    """Where the cells of a padded crop lie in the picture.

    Cell centre ``k`` of the padded crop (0 is the padding) is at ``x0 + (k + 0.5) * width / 30``,
    where pixel ``i`` spans ``i`` to ``i + 1``.
    """

    x0: int
    y0: int
    width: int
    height: int


def mask_grid(box: NDArray[np.float32]) -> MaskGrid:
    """Find the picture's pixels that a crop, padded by one cell a side, is spread over.

    As torchvision does in ``paste_masks_in_image``: the box grows by 30/28 about its centre, its
    corners are truncated towards zero, and both corner pixels belong to it.

    Args:
        box: ``[4]`` float32, x1 y1 x2 y2, finite.
    """
    growth = np.float32((MASK_SIZE + 2) / MASK_SIZE)
    x1, y1, x2, y2 = np.asarray(box, dtype=np.float32)
    half = np.float32(0.5)
    centre_x, centre_y = (x2 + x1) * half, (y2 + y1) * half
    half_width, half_height = (x2 - x1) * half * growth, (y2 - y1) * half * growth
    left, top = int(centre_x - half_width), int(centre_y - half_height)
    right, bottom = int(centre_x + half_width), int(centre_y + half_height)
    return MaskGrid(left, top, max(right - left + 1, 1), max(bottom - top + 1, 1))


def _interpolation(first: int, last: int, size: int) -> NDArray[np.float32]:
    """Weights ``[last - first, 28]`` of bilinear resizing from 30 padded cells to ``size`` pixels.

    Pixel centres map onto cell centres (``align_corners=False``). The padding is zero, so its two
    columns are left out; at the ends the nearest cell is padding too.
    """
    cells = MASK_SIZE + 2
    position = (np.arange(first, last, dtype=np.float32) + np.float32(0.5)) * np.float32(
        cells / size
    ) - np.float32(1.5)
    distance = np.abs(position[:, None] - np.arange(MASK_SIZE, dtype=np.float32))
    return np.maximum(np.float32(1) - distance, np.float32(0))


def paste_mask(crop: NDArray[np.uint8], box: NDArray[np.float32], width: int, height: int) -> Patch:
    """Turn a crop into the pixels under its box.

    The same pixels as ``torchvision.models.detection.roi_heads.paste_masks_in_image`` above 0.5,
    without the picture around them. Bilinear resizing is separable, hence two small matrix
    products.

    Args:
        crop: ``[28, 28]`` uint8, probability x 255.
        box: ``[4]`` float32, x1 y1 x2 y2 in pixels, finite.
        width: the picture's, pixels; what lies outside is cut off.
        height: likewise.
    """
    grid = mask_grid(box)
    x0, x1 = max(grid.x0, 0), min(grid.x0 + grid.width, width)
    y0, y1 = max(grid.y0, 0), min(grid.y0 + grid.height, height)
    if x0 >= x1 or y0 >= y1:
        return Patch(0, 0, np.zeros((0, 0), dtype=np.bool_))
    rows = _interpolation(y0 - grid.y0, y1 - grid.y0, grid.height)
    columns = _interpolation(x0 - grid.x0, x1 - grid.x0, grid.width)
    return Patch(x0, y0, rows @ crop.astype(np.float32) @ columns.T > HALF)


def pack_crops(crops: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Threshold crops ``[N, 28, 28]`` and pack them to ``[N, 98]``: row-major, high bit first."""
    return np.packbits((crops > HALF).reshape(len(crops), MASK_SIZE * MASK_SIZE), axis=1)


def unpack_crops(packed: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Undo ``pack_crops``: ``[N, 98]`` to crops ``[N, 28, 28]`` of 0 and 255."""
    bits = np.unpackbits(packed, axis=1)
    return (bits * np.uint8(255)).reshape(len(packed), MASK_SIZE, MASK_SIZE)


def encode_runs(patch: Patch, width: int, height: int) -> NDArray[np.int64]:
    """COCO's uncompressed RLE of a patch in its picture.

    Runs down the columns of the whole picture, background first (``rleEncode`` in pycocotools),
    found in the patch alone.

    Returns:
        ``[R]`` int64 run lengths; their sum is ``width * height``.
    """
    x0, y0, pixels = patch
    rows, columns = pixels.shape
    # One row of background below each column ends its last run; a run that goes on at the top of
    # the next column is joined again below.
    padded = np.zeros((columns, rows + 1), dtype=np.int8)
    padded[:, :rows] = pixels.T
    flat = np.flatnonzero(np.diff(padded.reshape(-1), prepend=np.int8(0)))
    if not len(flat):
        return np.array([width * height], dtype=np.int64)
    column, row = np.divmod(flat, rows + 1)
    turns = (column + x0) * height + row + y0  # picture index where a run begins, alternately 1, 0
    joined = np.flatnonzero(turns[1:-1:2] == turns[2::2])
    turns = np.delete(turns, np.concatenate([2 * joined + 1, 2 * joined + 2]))
    runs = np.diff(turns, prepend=0, append=width * height)
    return runs if runs[-1] else runs[:-1]


def decode_runs(runs: NDArray[np.int64], width: int, height: int) -> Patch:
    """Undo ``encode_runs``: the smallest patch that holds the object.

    Args:
        runs: ``[R]`` int64, none negative, of sum ``width * height``.
        width: the picture's, pixels.
        height: likewise.
    """
    ends = np.cumsum(runs)
    starts, stops = ends[0:-1:2], ends[1::2]  # of the object's runs
    filled = starts < stops
    starts, stops = starts[filled], stops[filled]
    if not len(starts):
        return Patch(0, 0, np.zeros((0, 0), dtype=np.bool_))
    x0, x1 = int(starts[0] // height), int((stops[-1] - 1) // height) + 1
    edges = np.zeros((x1 - x0) * height + 1, dtype=np.int8)
    np.add.at(edges, starts - x0 * height, np.int8(1))
    np.add.at(edges, stops - x0 * height, np.int8(-1))
    columns = np.cumsum(edges[:-1], dtype=np.int8).view(np.bool_).reshape(x1 - x0, height)
    rows = np.flatnonzero(columns.any(axis=0))
    y0, y1 = int(rows[0]), int(rows[-1]) + 1
    return Patch(x0, y0, np.ascontiguousarray(columns[:, y0:y1].T))


def compress_runs(runs: Sequence[NDArray[np.int64]]) -> list[bytes]:
    """COCO's compressed ``counts`` of many masks at once (``rleToString`` in pycocotools).

    From the fourth run on, the difference to the run before the last is written; each number in
    groups of five bits, low group first, sign-extended, with a sixth bit for "more" and 48 added.
    """
    if not runs:
        return []
    lengths = np.array([len(r) for r in runs])
    deltas = np.concatenate([np.concatenate([r[:3], r[3:] - r[1:-2]]) for r in runs])
    groups, more = [], []
    alive = np.ones(len(deltas), dtype=np.bool_)
    while alive.any():
        group = deltas & 0x1F
        deltas = deltas >> 5
        goes_on = alive & (deltas != np.where(group & 0x10, -1, 0))
        groups.append(group + 48 + 0x20 * goes_on)
        more.append(alive)
        alive = goes_on
    written = np.stack(more, axis=1)
    text = np.stack(groups, axis=1).astype(np.uint8)[written].tobytes()
    ends = np.cumsum(written.sum(axis=1))[np.cumsum(lengths) - 1].tolist()
    return [text[a:b] for a, b in zip([0, *ends[:-1]], ends, strict=True)]


def decompress_runs(counts: bytes, pixels: int) -> NDArray[np.int64]:
    """Undo ``compress_runs`` for one mask.

    Args:
        counts: the compressed string.
        pixels: width x height of the picture.

    Raises:
        ValueError: it is no run-length code of a mask of that many pixels.
    """
    codes = np.frombuffer(counts, dtype=np.uint8).astype(np.int64) - 48
    if not len(codes) or codes.min() < 0 or codes.max() > 0x3F:
        raise ValueError("a character of the counts is not one of COCO's")
    last = np.flatnonzero(codes < 0x20)
    if not len(last) or last[-1] != len(codes) - 1:
        raise ValueError("the counts end inside a number")
    first = np.concatenate([[0], last[:-1] + 1])
    size = last - first + 1
    if size.max() > 7:
        raise ValueError("a number in the counts is too large")
    place = np.arange(len(codes)) - np.repeat(first, size)
    runs = np.add.reduceat((codes & 0x1F) << (5 * place), first)
    runs -= ((codes[last] & 0x10) != 0).astype(np.int64) << (5 * size)
    runs[1::2] = np.cumsum(runs[1::2])
    runs[2::2] = np.cumsum(runs[2::2])
    # Seven groups hold 34 bits and a sign: sums of them cannot overflow on their way to this check.
    if runs.min() < 0 or runs.max() > pixels or runs.sum() != pixels:
        raise ValueError(f"the runs do not fill a picture of {pixels} pixels")
    return runs
