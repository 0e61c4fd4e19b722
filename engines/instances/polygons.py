"""Polygons: the outline of a mask crop in source pixels, and back to pixels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maskcast.engines.instances.masks import HALF, MASK_SIZE, Crossings, Patch, mask_grid


def _segments() -> NDArray[np.int8]:
    """Make marching squares' table ``[32, 4]``: the edge where a contour leaves, by entry edge.

    Edges: 0 top, 1 right, 2 bottom, 3 left. Row: the corners inside (1 top left, 2 top right,
    4 bottom right, 8 bottom left), + 16 where the saddle between two opposite corners is inside.
    -1: no contour enters there. The inside is on the right hand, so going clockwise around the
    square on screen, a contour enters where the inside ends, and leaves where it begins again.
    """
    table = np.full((32, 4), -1, dtype=np.int8)
    for case in range(32):
        corner = [bool(case & bit) for bit in (1, 2, 4, 8)]
        outward = [edge for edge in range(4) if corner[edge] and not corner[(edge + 1) % 4]]
        inward = [edge for edge in range(4) if not corner[edge] and corner[(edge + 1) % 4]]
        for edge in outward:
            # A saddle inside joins the two corners: the contour cuts off the corner outside.
            step = 1 if len(outward) == 1 or case & 16 else -1
            leave = edge
            while leave not in inward:
                leave = (leave + step) % 4
            table[case, edge] = leave
    return table


_SEGMENTS = _segments()


def _successors(values: NDArray[np.float32], level: float) -> dict[int, int]:
    """Link every crossed grid edge to the next one along its contour.

    Edge ``2 * (row * columns + column)`` runs right from that point, the one after it runs down.
    """
    inside = values > level
    case = inside[:-1, :-1] + 2 * inside[:-1, 1:] + 4 * inside[1:, 1:] + 8 * inside[1:, :-1]
    row, column = np.nonzero((case != 0) & (case != 15))
    found = case[row, column]
    saddle = np.flatnonzero((found == 5) | (found == 10))
    if len(saddle):
        r, c = row[saddle], column[saddle]
        a, b, d, e = values[r, c], values[r, c + 1], values[r + 1, c], values[r + 1, c + 1]
        # Where the bilinear surface is flat (Nielson and Hamann, The Asymptotic Decider, 1991).
        found[saddle] += 16 * ((a * e - b * d) / (a + e - b - d) > level)
    leave = _SEGMENTS[found]
    square, enter = np.nonzero(leave >= 0)
    columns = values.shape[1]
    first = 2 * (row * columns + column)[square]
    edge = np.array([0, 3, 2 * columns, 1])  # top, right, bottom, left of a square, from its top
    start = first + edge[enter]
    end = first + edge[leave[square, enter]]
    return dict(zip(start.tolist(), end.tolist(), strict=True))


def contours(values: NDArray[np.float32], level: float) -> list[NDArray[np.float64]]:
    """Trace where a grid of values crosses a level.

    Marching squares (Lorensen and Cline, Marching Cubes, 1987, in two dimensions), linear between
    neighbouring points.

    Args:
        values: ``[h, w]`` float32; what lies above ``level`` is inside. The outermost rows and
            columns must not, so that every contour closes.
        level: may equal a value.

    Returns:
        Rings ``[V, 2]`` float64: column and row, V >= 4, the inside on the right hand on screen.
    """
    successors = _successors(values, level)
    rings: list[list[int]] = []
    while successors:
        edge, following = successors.popitem()
        ring = [edge]
        while following != edge:
            ring.append(following)
            following = successors.pop(following)
        rings.append(ring)
    if not rings:
        return []
    point, down = np.divmod(np.concatenate([np.array(ring) for ring in rings]), 2)
    row, column = np.divmod(point, values.shape[1])
    near, far = values[row, column], values[row + down, column + 1 - down]
    fraction = (level - near) / (far - near).astype(np.float64)
    points = np.stack([column + (1 - down) * fraction, row + down * fraction], axis=1)
    return np.split(points, np.cumsum([len(ring) for ring in rings])[:-1])


def _surrounded(values: NDArray[Any]) -> NDArray[np.float32]:
    """Put one row or column of zeros on each side."""
    surrounded = np.zeros((values.shape[0] + 2, values.shape[1] + 2), dtype=np.float32)
    surrounded[1:-1, 1:-1] = values
    return surrounded


def trace_mask(
    crop: NDArray[np.uint8], box: NDArray[np.float32], width: int, height: int
) -> list[NDArray[np.float32]]:
    """Trace the outline of a crop at probability 0.5, finer than pixels.

    The cells lie where ``crop_crossings`` puts them, with one cell of zeros around.

    Args:
        crop: ``[28, 28]`` uint8, probability x 255.
        box: ``[4]`` float32, x1 y1 x2 y2 in pixels, finite.
        width: the image's, pixels; the outline is clipped to it.
        height: likewise.

    Returns:
        Rings ``[V, 2]`` float32, x and y in pixels (the first pixel spans 0 to 1), not repeating
        the first point. Outer rings run clockwise on screen, holes counter-clockwise; even-odd and
        non-zero filling agree.
    """
    grid = mask_grid(box)
    scale = np.array([grid.width, grid.height]) / (MASK_SIZE + 2)
    origin = np.array([grid.x0, grid.y0])
    limit = np.array([width, height])
    return [
        np.minimum(np.maximum(origin + (ring + 0.5) * scale, 0), limit).astype(np.float32)
        for ring in contours(_surrounded(crop), HALF)
    ]


def trace_patch(patch: Patch) -> list[NDArray[np.float32]]:
    """Trace the outline of pixels, midway between those inside and those outside.

    Returns:
        Rings as ``trace_mask`` gives them; ``ring_crossings`` gives back the same pixels.
    """
    origin = np.array([patch.x0 - 0.5, patch.y0 - 0.5])
    return [(origin + ring).astype(np.float32) for ring in contours(_surrounded(patch.pixels), 0.5)]


def ring_crossings(rings: Sequence[NDArray[np.float32]]) -> Crossings:
    """Find where a polygon begins and ends in each column, by the even-odd rule.

    A pixel belongs to the object where its centre lies inside. Scan conversion (Foley et al.,
    Computer Graphics, section 3.6) of all edges at once.

    Args:
        rings: ``[V, 2]`` float32 each, inside the image, as ``trace_mask`` gives them.
    """
    if not rings:
        return Crossings(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64))
    x1, y1 = np.concatenate(list(rings)).astype(np.float64).T
    x2, y2 = np.concatenate([np.roll(ring, -1, axis=0) for ring in rings]).astype(np.float64).T
    # The first column, and the one after the last, whose centre line an edge crosses.
    first, end = np.ceil(np.sort([x1, x2], axis=0) - 0.5).astype(np.int64)
    columns = end - first
    edge = np.repeat(np.arange(len(x1)), columns)
    column = np.arange(len(edge)) - np.repeat(np.cumsum(columns) - columns, columns) + first[edge]
    y = y1[edge] + (column + 0.5 - x1[edge]) / (x2[edge] - x1[edge]) * (y2[edge] - y1[edge])
    return Crossings(column, np.ceil(y - 0.5).astype(np.int64))
