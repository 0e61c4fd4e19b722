"""Masks: from 28x28 crops of probabilities to pixels or bits.

The network gives masks as small crops, and they are kept in that form. Each is converted on
request, to pixels inside its box only: no full-size mask is made.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

MASK_SIZE = 28
"""Side of a mask crop in cells: the mask head's output (He et al., Mask R-CNN, figure 4)."""

HALF = 127.5
"""Probability 0.5 on the scale of a uint8 crop; higher values are the object."""

PACKED_BYTES = MASK_SIZE * MASK_SIZE // 8
"""Bytes of a crop with one bit per cell."""


class Patch(NamedTuple):
    """The box-sized part of a mask.

    Attributes:
        x0, y0: the image's pixel under ``pixels[0, 0]``.
        pixels: ``[h, w]`` bool; nothing of the object lies outside. May be empty.
    """

    x0: int
    y0: int
    pixels: NDArray[np.bool_]


class MaskGrid(NamedTuple):
    """Where the cells of a padded crop lie in the image.

    Cell centre ``k`` of the padded crop (0 is the padding) is at ``x0 + (k + 0.5) * width / 30``,
    where pixel ``i`` spans ``i`` to ``i + 1``.
    """

    x0: int
    y0: int
    width: int
    height: int


def mask_grid(box: NDArray[np.float32]) -> MaskGrid:
    """Find the image's pixels that a crop, padded by one cell a side, is spread over.

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


class Crossings(NamedTuple):
    """The outline of a mask, column by column: enough to fill it or to count its runs.

    Going down ``column[i]``, the mask begins or ends above the pixel at ``row[i]`` (the image's
    height, if it ends at the border). Two crossings at one place cancel.

    Attributes:
        column: ``[T]`` int64.
        row: ``[T]`` int64.
    """

    column: NDArray[np.int64]
    row: NDArray[np.int64]


def crop_crossings(
    crop: NDArray[np.uint8], box: NDArray[np.float32], width: int, height: int
) -> Crossings:
    """Find where the mask of a crop begins and ends in each column of the image.

    The pixels are those of ``paste_masks_in_image`` of torchvision (roi_heads.py) above 0.5:
    bilinear resizing from the 30 x 30 padded crop to the box's pixels, pixel centres upon cell
    centres (``align_corners=False``). Between two rows of cells that surface is linear down a
    column, so it is enough to look between the cells, not at every pixel.

    Args:
        crop: ``[28, 28]`` uint8, probability x 255.
        box: ``[4]`` float32, x1 y1 x2 y2 in pixels, finite.
        width: the image's, pixels; what lies outside is cut off.
        height: likewise.
    """
    grid = mask_grid(box)
    cells = np.zeros((MASK_SIZE + 2, MASK_SIZE + 2))
    cells[1:-1, 1:-1] = crop.T  # [column of cells, row of cells]
    first = max(grid.x0, 0)
    columns = np.arange(first, min(grid.x0 + grid.width, width))
    position = (columns - grid.x0 + 0.5) * len(cells) / grid.width - 0.5
    # Beyond the first and the last cell centre the nearest cell is used: padding.
    position = np.minimum(np.maximum(position, 0), MASK_SIZE + 1)
    left = np.minimum(position.astype(np.int64), MASK_SIZE)
    profile = np.take(cells[1:] - cells[:-1], left, axis=0)  # [columns, rows of cells]
    profile *= (position - left)[:, None]
    profile += np.take(cells, left, axis=0)
    inside = profile > HALF
    column, cell = np.divmod(np.flatnonzero(inside[:, 1:] != inside[:, :-1]), len(cells) - 1)
    above, below = profile[column, cell], profile[column, cell + 1]
    half = cell + (HALF - above) / (below - above)  # where the probability is 0.5, in cells
    row = (half + 0.5) * grid.height / len(cells) - 0.5
    # The first pixel above 0.5 where the object begins, the first not above it where it ends.
    row = np.where(above > HALF, np.ceil(row), np.floor(row) + 1).astype(np.int64) + grid.y0
    return Crossings(column + first, np.minimum(np.maximum(row, 0), height))


def fill_crossings(crossings: Crossings) -> Patch:
    """Fill a mask between its crossings."""
    column, row = crossings
    if not len(column):
        return Patch(0, 0, np.zeros((0, 0), dtype=np.bool_))
    x0, y0 = int(column.min()), int(row.min())
    toggles = np.zeros((int(row.max()) - y0 + 1, int(column.max()) - x0 + 1), dtype=np.uint8)
    np.add.at(toggles, (row - y0, column - x0), np.uint8(1))
    # Modulo 256 the sums stay odd or even. The last row only ends what is above it.
    pixels = np.add.accumulate(toggles[:-1], axis=0, dtype=np.uint8) & np.uint8(1)
    return Patch(x0, y0, pixels.view(np.bool_))


def pack_crops(crops: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Threshold crops ``[N, 28, 28]`` and pack them to ``[N, 98]``: row-major, high bit first."""
    return np.packbits((crops > HALF).reshape(len(crops), MASK_SIZE * MASK_SIZE), axis=1)


def unpack_crops(packed: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Undo ``pack_crops``: ``[N, 98]`` to crops ``[N, 28, 28]`` of 0 and 255."""
    bits = np.unpackbits(packed, axis=1)
    return (bits * np.uint8(255)).reshape(len(packed), MASK_SIZE, MASK_SIZE)
