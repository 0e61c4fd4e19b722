"""Coverage: which share of each mask lies inside each polygon, from its crop."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from maskcast.engines.instances.masks import MASK_SIZE

_ROWS = np.arange(MASK_SIZE, dtype=np.float64)

_KNOTS = np.arange(MASK_SIZE + 1) - np.arange(MASK_SIZE)[:, None]
_SUMS = np.hstack([_KNOTS > 0, np.maximum(_KNOTS - 0.5, 0)]).astype(np.float32)
"""Times a row of cells: at each border between two, the cells to the left, and their integral."""

FLAT = 1e-6
"""Cells that an edge goes sideways within a row of cells below which it counts as upright."""


class Coverage:
    """Polygons that masks are measured against.

    A mask is taken as its 28 x 28 cells, each wholly inside or outside the object. What the polygon
    covers of it is computed exactly: by Green's theorem the area is the integral, along the
    polygon's edges, of what lies to the left of each point in its row of cells. In a row that is
    linear from cell to cell, so the integral along an edge is a difference of two squares' sums.

    Args:
        polygons: each ``[V, 2]`` x and y in pixels, V at least 3, not closed, without crossing
            edges.
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
        way = self._end - self._begin
        self._slope = np.divide(way[:, 0], way[:, 1], out=np.zeros(len(way)), where=way[:, 1] != 0)
        self._across = way[:, ::-1] * [1, -1]
        self._offset = (self._begin * self._across).sum(axis=1)

    def shares(self, crops: NDArray[np.uint8], boxes: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the share of each mask inside each polygon: ``[N, polygons]``, 0 to 1.

        Only masks whose boxes are met by an edge of a polygon are measured; of the others it is
        enough to know where one point of the box lies. The share of an empty mask is 0.

        Args:
            crops: ``[N, 28, 28]`` uint8, 0 or 1.
            boxes: ``[N, 4]`` x1 y1 x2 y2 in pixels.
        """
        if not len(boxes) or not self._count:
            return np.zeros((len(boxes), self._count))
        shares = self._holds(boxes[:, :2]).astype(np.float64)
        instance, polygon = np.nonzero(self._touches(boxes))
        if len(instance):
            shares[instance, polygon] = self._measure(crops, boxes, instance, polygon)
        shares[crops.reshape(len(crops), -1).max(axis=1) == 0] = 0
        return shares

    def hold(self, points: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Tell which polygon holds which point: ``[N, polygons]``; points ``[N, 2]`` in pixels."""
        if not self._count:
            return np.zeros((len(points), 0), np.bool_)
        return self._holds(points)

    def _holds(self, points: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Count the edges to the left of each point: an odd number, and it is inside."""
        x, y = points[:, None, 0], points[:, None, 1]
        x0, y0 = self._begin.T
        spans = (y0 <= y) != (self._end[:, 1] <= y)
        left_of = x0 + (y - y0) * self._slope <= x
        left = np.add.reduceat((spans & left_of).astype(np.uint8), self._first, axis=1)
        return (left % 2).astype(np.bool_)

    def _touches(self, boxes: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Tell which boxes are met by edges of which polygons: ``[N, polygons]``."""
        apart = (
            (self._low[:, 0] >= boxes[:, None, 2])
            | (self._high[:, 0] <= boxes[:, None, 0])
            | (self._low[:, 1] >= boxes[:, None, 3])
            | (self._high[:, 1] <= boxes[:, None, 1])
        )
        # The box lies on one side of the edge's line, if its centre does by more than its reach.
        centre, half = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]) / 2
        from_line = np.abs(centre @ self._across.T - self._offset)
        apart |= from_line >= half @ np.abs(self._across).T
        return np.add.reduceat((~apart).astype(np.uint8), self._first, axis=1) > 0

    def _measure(
        self,
        crops: NDArray[np.uint8],
        boxes: NDArray[np.float64],
        instance: NDArray[np.intp],
        polygon: NDArray[np.intp],
    ) -> NDArray[np.float64]:
        """Return the share of pairs of mask and polygon: ``[P]``."""
        used, place = np.unique(instance, return_inverse=True)
        tables = _Integrals(crops[used])
        sizes = self._sizes[polygon]
        starts = np.cumsum(sizes) - sizes
        pair = np.repeat(np.arange(len(polygon)), sizes)
        edge = np.arange(len(pair)) - np.repeat(starts - self._first[polygon], sizes)
        box = boxes[instance[pair]]
        # Edges above, below or to the left of the box have nothing of the mask to their left.
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
    """Sums over the cells of masks: what lies left of a point in a row, and the integral of that.

    Attributes:
        total: ``[N]`` number of cells of each mask.
    """

    def __init__(self, crops: NDArray[np.uint8]) -> None:
        rows = crops.reshape(-1, MASK_SIZE).astype(np.float32)
        cells = np.zeros((len(rows), MASK_SIZE + 1), np.float32)  # with nothing behind the last
        cells[:, :-1] = rows
        both = rows @ _SUMS  # halves of whole numbers below 2**10: float32 holds them exactly
        self.total = both[:, MASK_SIZE].reshape(-1, MASK_SIZE).sum(axis=1)
        self._cells, self._both = cells.ravel(), both.reshape(-1)

    def along(
        self,
        mask: NDArray[np.intp],
        row: NDArray[np.intp],
        a: NDArray[np.float64],
        b: NDArray[np.float64],
    ) -> NDArray[np.float64]:
        """Return the mean, from a to b, of the mask's cells left of a point in a row, ``[M]``."""
        first = mask * MASK_SIZE + row
        way = b - a
        upright = np.abs(way) < FLAT
        sums_a, left_a = self._at(first, a)
        sums_b, _ = self._at(first, b)
        return np.where(upright, left_a, (sums_b - sums_a) / np.where(upright, 1, way))

    def _at(
        self, first: NDArray[np.intp], u: NDArray[np.float64]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        inside = np.minimum(np.maximum(u, 0), MASK_SIZE)
        cell = inside.astype(np.intp)
        part = np.maximum(u, 0) - cell  # beyond the last cell it goes on and on
        at = first * (2 * MASK_SIZE + 2) + cell
        cells, left = self._cells[at - first * (MASK_SIZE + 1)], self._both[at]
        sums = self._both[at + (MASK_SIZE + 1)]
        return sums + part * (left + part * cells / 2), left + part * cells


def feet(crops: NDArray[np.uint8], boxes: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the lowest point of each mask, below its centre: ``[N, 2]`` x and y in pixels.

    Of an empty mask it is the middle of the lower side of its box.
    """
    rows = crops.max(axis=2) > 0
    lowest = MASK_SIZE - rows[:, ::-1].argmax(axis=1)
    x, _ = centres(crops, boxes).T
    y = boxes[:, 1] + (boxes[:, 3] - boxes[:, 1]) * lowest / MASK_SIZE
    return np.stack([x, y], axis=1)


def centres(crops: NDArray[np.uint8], boxes: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the centre of gravity of each mask: ``[N, 2]`` x and y in pixels.

    Of an empty mask it is the centre of its box.
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
