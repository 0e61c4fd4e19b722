"""Coverage: the share of each mask that is inside each polygon, computed from its crop."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from maskcast.engines.instances.masks import MASK_SIZE

_ROWS = np.arange(MASK_SIZE, dtype=np.float64)

_KNOTS = np.arange(MASK_SIZE + 1) - np.arange(MASK_SIZE)[:, None]
_SUMS = np.hstack([_KNOTS > 0, np.maximum(_KNOTS - 0.5, 0)]).astype(np.float32)
"""Matrix that a row of cells is multiplied by: at each border between two cells, it gives the
number of set cells to the left, and the integral of that number."""

VERTICAL = 1e-6
"""An edge that spans fewer cells than this horizontally, within a row, is treated as vertical."""


class Coverage:
    """Polygons for which the covered share of masks is computed.

    A mask consists of 28 x 28 cells, each of which is entirely inside or outside the object. The
    area inside a polygon is computed exactly: by Green's theorem it is the integral, along the
    polygon's edges, of the number of set cells to the left of each point in its row. Within a row
    that number is piecewise linear, so its integral along an edge is a difference of two values of
    a piecewise quadratic function.

    Args:
        polygons: each ``[V, 2]`` float64, x and y in pixels, V at least 3, not closed, without
            crossing edges.
    """

    def __init__(self, polygons: Sequence[NDArray[np.float64]]) -> None:
        self._count = len(polygons)
        corners = [np.asarray(polygon, np.float64) for polygon in polygons]
        none = np.zeros((0, 2))
        self._begin = np.concatenate([none, *corners])  # of each edge of each polygon
        self._end = np.concatenate([none, *(np.roll(corner, -1, axis=0) for corner in corners)])
        self._sizes = np.array([len(corner) for corner in corners], np.intp)
        self._first = np.cumsum(self._sizes) - self._sizes
        self._low = np.minimum(self._begin, self._end)
        self._high = np.maximum(self._begin, self._end)
        edge = self._end - self._begin
        self._slope = np.divide(
            edge[:, 0], edge[:, 1], out=np.zeros(len(edge)), where=edge[:, 1] != 0
        )
        self._normal = edge[:, ::-1] * [1, -1]
        self._offset = (self._begin * self._normal).sum(axis=1)

    def shares(self, crops: NDArray[np.uint8], boxes: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the share of each mask inside each polygon: ``[N, polygons]``, 0 to 1.

        The area is computed only for masks whose boxes touch an edge of a polygon. For the others,
        one point of the box decides. The share of an empty mask is 0.

        Args:
            crops: ``[N, 28, 28]`` uint8, 0 or 1.
            boxes: ``[N, 4]`` x1 y1 x2 y2 in pixels.
        """
        if not len(boxes) or not self._count:
            return np.zeros((len(boxes), self._count))
        shares = self.contains(boxes[:, :2]).astype(np.float64)
        instance, polygon = np.nonzero(self._touches(boxes))
        if len(instance):
            shares[instance, polygon] = self._measure(crops, boxes, instance, polygon)
        shares[crops.reshape(len(crops), -1).max(axis=1) == 0] = 0
        return shares

    def contains(self, points: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Tell which points are inside which polygons: ``[N, polygons]``.

        Args:
            points: ``[N, 2]`` x and y in pixels.
        """
        if not self._count:
            return np.zeros((len(points), 0), np.bool_)
        # A point is inside if the number of edges to its left is odd.
        x, y = points[:, None, 0], points[:, None, 1]
        x0, y0 = self._begin.T
        spans = (y0 <= y) != (self._end[:, 1] <= y)
        left_of = x0 + (y - y0) * self._slope <= x
        left = np.add.reduceat((spans & left_of).astype(np.uint8), self._first, axis=1)
        return (left % 2).astype(np.bool_)

    def _touches(self, boxes: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Tell which boxes are touched by an edge of which polygons: ``[N, polygons]``."""
        apart = (
            (self._low[:, 0] >= boxes[:, None, 2])
            | (self._high[:, 0] <= boxes[:, None, 0])
            | (self._low[:, 1] >= boxes[:, None, 3])
            | (self._high[:, 1] <= boxes[:, None, 1])
        )
        # A box is on one side of an edge's line if its centre is farther from the line than the
        # projection of half the box on the line's normal.
        centre, half = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]) / 2
        from_line = np.abs(centre @ self._normal.T - self._offset)
        apart |= from_line >= half @ np.abs(self._normal).T
        return np.add.reduceat((~apart).astype(np.uint8), self._first, axis=1) > 0

    def _measure(
        self,
        crops: NDArray[np.uint8],
        boxes: NDArray[np.float64],
        instance: NDArray[np.intp],
        polygon: NDArray[np.intp],
    ) -> NDArray[np.float64]:
        """Return the share of the mask inside the polygon for each pair of both: ``[P]``."""
        used, place = np.unique(instance, return_inverse=True)
        tables = _Integrals(crops[used])
        sizes = self._sizes[polygon]
        starts = np.cumsum(sizes) - sizes
        pair = np.repeat(np.arange(len(polygon)), sizes)
        edge = np.arange(len(pair)) - np.repeat(starts - self._first[polygon], sizes)
        box = boxes[instance[pair]]
        # Edges above, below or to the left of the box have no cells of the mask to their left.
        passes = (self._low[edge, 1] < box[:, 3]) & (self._high[edge, 1] > box[:, 1])
        passes &= self._high[edge, 0] > box[:, 0]
        pair, edge, box = pair[passes], edge[passes], box[passes]
        scale = MASK_SIZE / (box[:, 2:] - box[:, :2])
        u0, v0 = ((self._begin[edge] - box[:, :2]) * scale).T[..., None]
        u1, v1 = ((self._end[edge] - box[:, :2]) * scale).T[..., None]
        low = np.minimum(np.maximum(v0, _ROWS), _ROWS + 1)  # [edges, 28]: the edge in each row
        high = np.minimum(np.maximum(v1, _ROWS), _ROWS + 1)
        edges, rows = np.nonzero(low != high)
        low, high = low[edges, rows], high[edges, rows]
        u0, v0 = u0[edges, 0], v0[edges, 0]
        slope = (u1[edges, 0] - u0) / (v1[edges, 0] - v0)
        pairs = pair[edges]
        left = tables.along(place[pairs], rows, u0 + (low - v0) * slope, u0 + (high - v0) * slope)
        area = np.bincount(pairs, weights=left * (high - low), minlength=len(polygon))
        total = np.maximum(tables.total[place], 1)
        shares: NDArray[np.float64] = np.clip(np.abs(area) / total, 0, 1)
        return shares


class _Integrals:
    """Sums over the cells of masks: the set cells left of a point in a row, and their integral.

    Attributes:
        total: number of set cells of each mask, ``[N]``.
    """

    def __init__(self, crops: NDArray[np.uint8]) -> None:
        rows = crops.reshape(-1, MASK_SIZE).astype(np.float32)
        cells = np.zeros((len(rows), MASK_SIZE + 1), np.float32)  # one empty cell after the last
        cells[:, :-1] = rows
        both = rows @ _SUMS  # multiples of 0.5 below 2**10, which float32 represents exactly
        self.total = both[:, MASK_SIZE].reshape(-1, MASK_SIZE).sum(axis=1)
        self._cells, self._both = cells.ravel(), both.reshape(-1)

    def along(
        self,
        mask: NDArray[np.intp],
        row: NDArray[np.intp],
        a: NDArray[np.float64],
        b: NDArray[np.float64],
    ) -> NDArray[np.float64]:
        """Return the mean number of set cells left of the points from a to b in a row: ``[M]``.

        Args:
            mask: index of the mask, ``[M]``.
            row: row of cells, ``[M]``.
            a: x of the first point, in cells, ``[M]``.
            b: x of the last point, in cells, ``[M]``.
        """
        first = mask * MASK_SIZE + row
        length = b - a
        is_vertical = np.abs(length) < VERTICAL
        sums_a, left_a = self._at(first, a)
        sums_b, _ = self._at(first, b)
        return np.where(is_vertical, left_a, (sums_b - sums_a) / np.where(is_vertical, 1, length))

    def _at(
        self, first: NDArray[np.intp], u: NDArray[np.float64]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        inside = np.minimum(np.maximum(u, 0), MASK_SIZE)
        cell = inside.astype(np.intp)
        part = np.maximum(u, 0) - cell  # more than 1 beyond the last cell
        at = first * (2 * MASK_SIZE + 2) + cell
        cells, left = self._cells[at - first * (MASK_SIZE + 1)], self._both[at]
        sums = self._both[at + (MASK_SIZE + 1)]
        return sums + part * (left + part * cells / 2), left + part * cells


def feet(crops: NDArray[np.uint8], boxes: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the point below the centre of each mask at the height of its lowest cell.

    For an empty mask it is the middle of the lower side of the box.

    Args:
        crops: ``[N, 28, 28]`` uint8, 0 or 1.
        boxes: ``[N, 4]`` x1 y1 x2 y2 in pixels.

    Returns:
        ``[N, 2]`` x and y in pixels.
    """
    rows = crops.max(axis=2) > 0
    lowest = MASK_SIZE - rows[:, ::-1].argmax(axis=1)
    x, _ = centres(crops, boxes).T
    y = boxes[:, 1] + (boxes[:, 3] - boxes[:, 1]) * lowest / MASK_SIZE
    return np.stack([x, y], axis=1)


def centres(crops: NDArray[np.uint8], boxes: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the centroid of each mask; for an empty mask, the centre of the box.

    Args:
        crops: ``[N, 28, 28]`` uint8, 0 or 1.
        boxes: ``[N, 4]`` x1 y1 x2 y2 in pixels.

    Returns:
        ``[N, 2]`` x and y in pixels.
    """
    columns = crops.sum(axis=1, dtype=np.float64)
    rows = crops.sum(axis=2, dtype=np.float64)
    total = columns.sum(axis=1)
    weights = np.arange(MASK_SIZE) + 0.5
    cells = np.stack([columns @ weights, rows @ weights], axis=1)
    share = np.where(total > 0, 1 / np.maximum(total, 1), 0)[:, None] * cells / MASK_SIZE
    share = np.where(total[:, None] > 0, share, 0.5)
    result: NDArray[np.float64] = boxes[:, :2] + share * (boxes[:, 2:] - boxes[:, :2])
    return result
