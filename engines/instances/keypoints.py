"""Keypoints: the named points of a body, and their positions from a network's heatmaps."""

from __future__ import annotations

import functools
from functools import cached_property
from typing import Annotated

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

HEATMAP_SIZE = 56
"""Side of a keypoint's heatmap in cells (He et al., Mask R-CNN, section 5)."""

_INTERVALS = HEATMAP_SIZE + 1
"""Intervals between the centres of neighbouring cells, those beyond the border included."""
_PADDED = HEATMAP_SIZE + 4
"""Side of a heatmap whose border cells are repeated twice, as interpolation sees it."""
_CUBIC = -0.75
"""Keys' parameter of cubic convolution, as torch and OpenCV choose it."""
_OUTER = 0.1875
"""Largest absolute sum of the weights of the two outer taps, which are negative: it is reached half
way between two cells."""
_RADIUS = 3
"""The score sums the cells up to this far from the keypoint's own."""
_MAX_VALUES = 1 << 16
"""Pixels that are interpolated at once."""

Name = Annotated[str, Meta(min_length=1, max_length=64)]
Place = Annotated[int, Meta(ge=0, le=255)]


class Keypoints(msgspec.Struct, frozen=True, dict=True):
    """The points that a model finds in each instance.

    Attributes:
        names: of the K points, all different, 1 to 256.
        skeleton: pairs of indices into ``names`` that are drawn as lines.
    """

    names: Annotated[tuple[Name, ...], Meta(min_length=1, max_length=256)]
    skeleton: Annotated[tuple[tuple[Place, Place], ...], Meta(max_length=1024)] = ()

    def __post_init__(self) -> None:
        if len(set(self.names)) < len(self.names):
            raise ValueError("two keypoints have the same name")
        if any(place >= len(self.names) for line in self.skeleton for place in line):
            raise ValueError(f"the skeleton has an index that is not below {len(self.names)}")

    def __len__(self) -> int:
        return len(self.names)

    @cached_property
    def mirrored(self) -> tuple[int, ...]:
        """Index of each point's mirror image: "left_eye" and "right_eye" swap."""
        place = {name: i for i, name in enumerate(self.names)}
        return tuple(place.get(_other_side(name), i) for i, name in enumerate(self.names))


def _other_side(name: str) -> str:
    left, right = name.startswith("left"), name.startswith("right")
    return f"right{name[4:]}" if left else f"left{name[5:]}" if right else name


COCO_PERSON = Keypoints(
    names=(
        "nose",
        "left_eye",
        "right_eye",
        "left_ear",
        "right_ear",
        "left_shoulder",
        "right_shoulder",
        "left_elbow",
        "right_elbow",
        "left_wrist",
        "right_wrist",
        "left_hip",
        "right_hip",
        "left_knee",
        "right_knee",
        "left_ankle",
        "right_ankle",
    ),
    skeleton=(
        *((15, 13), (13, 11), (16, 14), (14, 12), (11, 12), (5, 11), (6, 12), (5, 6), (5, 7)),
        *((6, 8), (7, 9), (8, 10), (1, 2), (0, 1), (0, 2), (1, 3), (2, 4), (3, 5), (4, 6)),
    ),
)
"""The 17 points and 19 lines of COCO's category person."""


def decode_heatmaps(
    heatmaps: NDArray[np.float32], boxes: NDArray[np.float32], blur_cells: float = 0.0
) -> NDArray[np.float32]:
    """Find the position and the score of each keypoint.

    Without blur, the position is torchvision's, see ``find_peaks``. A small network's heatmap has
    several uncertain peaks, and the largest is often a lone one. With blur, the position is where
    the probability is the largest after a Gaussian filter: approximately the position with the
    largest expected object keypoint similarity, which is a Gaussian of the distance (COCO's
    keypoint evaluation).

    torchvision's score, the logit there, has no fixed scale. The score here is a probability:
    softmax over the heatmap, which the network is trained with, summed over the 7 x 7 cells around
    the keypoint, an eighth of the box each way. It estimates the probability that the point, if it
    is visible at all, lies there.

    Args:
        heatmaps: ``[N, K, 56, 56]`` float32 logits, finite.
        boxes: ``[N, 4]`` float32, x1 y1 x2 y2 in pixels, finite: where each heatmap lies.
        blur_cells: standard deviation of the filter, cells; 0 for none.

    Returns:
        ``[N, K, 3]`` float32: x and y in pixels of the boxes' frame, the score in 0..1.
    """
    shape = (*heatmaps.shape[:2], 3)
    points = np.zeros(shape, np.float32) if blur_cells else find_peaks(heatmaps, boxes)
    for found, maps, box in zip(points, heatmaps, boxes, strict=True):
        sides = np.maximum(box[2:] - box[:2], np.float32(1))
        probabilities = _softmax(maps)
        if blur_cells:
            found[:, :2] = _most_likely(probabilities, blur_cells)
            found[:, :2] *= sides / HEATMAP_SIZE
            found[:, :2] += box[:2]
        found[:, 2] = _probability(probabilities, (found[:, :2] - box[:2]) * HEATMAP_SIZE / sides)
    return points


def find_peaks(heatmaps: NDArray[np.float32], boxes: NDArray[np.float32]) -> NDArray[np.float32]:
    """Find the largest value of each heatmap after bicubic upsampling to its box's pixels.

    The result is that of ``heatmaps_to_keypoints`` in torchvision (roi_heads.py): a box has at
    least one pixel each way, a fraction of a pixel counts as one, and a position is the centre of a
    pixel. Only the parts of a heatmap in which the largest value can lie are upsampled.

    Args:
        heatmaps: as for ``decode_heatmaps``.
        boxes: likewise.

    Returns:
        ``[N, K, 3]`` float32: x and y in pixels of the boxes' frame, the value there.
    """
    points = np.zeros((*heatmaps.shape[:2], 3), np.float32)
    for found, maps, box in zip(points, heatmaps, boxes, strict=True):
        sides = np.maximum(box[2:] - box[:2], np.float32(1))
        pixels = np.ceil(sides)
        columns, rows = (_taps(int(count)) for count in pixels)
        _Surface(maps, rows, columns).find_peaks(found)
        found[:, :2] += np.float32(0.5)
        found[:, :2] *= sides / pixels
        found[:, :2] += box[:2]
    return points


class _Taps:
    """Cubic interpolation from the 56 cells to the pixels of one side of a box.

    Attributes:
        first: ``[57]`` int, the first pixel in each interval between two cell centres; interval 0
            is beyond the first cell.
        weights: ``[4, P, 57]`` float32, of the four cells around each pixel of an interval; where
            it has less than P pixels, the last one is repeated.
        is_used: ``[60]`` bool, whether there are pixels in the interval; the last 3 are False.
        nearest: ``[56]`` int, the interval of the pixel nearest to the centre of each cell.
    """

    def __init__(self, size: int) -> None:
        position = (np.arange(size, dtype=np.float32) + np.float32(0.5)) * np.float32(
            HEATMAP_SIZE / size
        ) - np.float32(0.5)
        below = np.floor(position)
        t = position - below
        interval = below.astype(np.intp) + 1
        self.first = np.searchsorted(interval, np.arange(_INTERVALS))
        count = np.diff(self.first, append=size)
        pixel = self.first + np.minimum(np.arange(count.max())[:, None], count - 1)
        distances = (t + 1, t, 1 - t, 2 - t)
        taps = np.stack([_cubic(d, is_near=i in (1, 2)) for i, d in enumerate(distances)])
        self.weights = taps.take(pixel.clip(0, size - 1), axis=1)
        self.is_used = np.zeros(_PADDED, np.bool_)
        self.is_used[:_INTERVALS] = count > 0
        centre = (np.arange(HEATMAP_SIZE) + 0.5) * size / HEATMAP_SIZE - 0.5
        self.nearest = interval[np.rint(centre).astype(np.intp).clip(0, size - 1)]


_taps = functools.lru_cache(maxsize=256)(_Taps)
"""Boxes have a few hundred different sizes."""


def _cubic(distance: NDArray[np.float32], *, is_near: bool) -> NDArray[np.float32]:
    """Evaluate Keys' kernel at a distance of up to 1 cell, or of 1 to 2."""
    a = np.float32(_CUBIC)
    x = distance
    if is_near:
        near: NDArray[np.float32] = ((a + 2) * x - (a + 3)) * x * x + 1
        return near
    far: NDArray[np.float32] = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return far


class _Surface:
    """Heatmaps of one instance, interpolated to the pixels of its box.

    An interval, here, is the square between four cell centres. Its number is the index in ``_flat``
    of the first of the 16 cells that it is interpolated from.

    Args:
        maps: ``[K, 56, 56]``.
        rows: of the box.
        columns: likewise.
    """

    def __init__(self, maps: NDArray[np.float32], rows: _Taps, columns: _Taps) -> None:
        self._maps, self._rows, self._columns = maps, rows, columns
        padded = np.empty((len(maps), _PADDED, _PADDED), np.float32)
        padded[:, 2:-2, 2:-2] = maps
        padded[:, 2:-2, :2] = maps[:, :, :1]
        padded[:, 2:-2, -2:] = maps[:, :, -1:]
        padded[:, :2] = padded[:, 2:3]
        padded[:, -2:] = padded[:, -3:-2]
        self._flat = padded.reshape(-1)

    def find_peaks(self, found: NDArray[np.float32]) -> None:
        """Write column, row and value of the largest pixel of each heatmap to ``[K, 3]``."""
        intervals = self._candidates()
        of_map = intervals // _PADDED**2
        best = np.empty(len(intervals), np.float32)
        pixels = self._rows.weights.shape[1] * self._columns.weights.shape[1]  # of an interval
        step = max(1, _MAX_VALUES // pixels)
        for start in range(0, len(intervals), step):
            part = slice(start, start + step)
            best[part] = self._interpolate(intervals[part]).max(axis=(0, 1))
        every = np.arange(len(found))
        largest = np.maximum.reduceat(best, np.searchsorted(of_map, every))
        is_largest = np.flatnonzero(~(best < largest[of_map]))
        winners = intervals[is_largest[np.searchsorted(of_map[is_largest], every)]]
        values = self._interpolate(winners)
        y, x = np.divmod(values.reshape(-1, len(found)).argmax(axis=0), values.shape[1])
        row, column = np.divmod(winners % _PADDED**2, _PADDED)
        found[:, 0] = self._columns.first[column] + x
        found[:, 1] = self._rows.first[row] + y
        found[:, 2] = values[y, x, every]

    def _candidates(self) -> NDArray[np.intp]:
        """Find the intervals in which the largest pixels may lie, ascending; at least one per map.

        Some weights are negative: with the largest M of the inner 4 of the 16 cells, the smallest m
        of all and the largest T of the heatmap, a value is at most M + b (M - m) + c (T - M), where
        -b and c are the largest sums of the weights of the 8 cells at the sides and of the 4 at the
        corners. An interval whose bound is less than a known pixel cannot contain the largest.
        """
        maps, flat = self._maps, self._flat
        row, column = np.divmod(maps.reshape(len(maps), -1).argmax(axis=1), HEATMAP_SIZE)
        top = maps[np.arange(len(maps)), row, column]
        peaks = np.arange(len(maps)) * _PADDED**2
        peaks += self._rows.nearest[row] * _PADDED + self._columns.nearest[column]
        known = self._interpolate(peaks).max(axis=(0, 1))
        b, c = 2 * (1 + _OUTER) * _OUTER, _OUTER**2
        # All heatmaps in one row: what begins in the last 3 rows or columns is no interval. New
        # memory for each operation would take longer than the operation.
        one, other, largest = np.zeros((3, flat.size), np.float32)
        np.maximum(flat[:-1], flat[1:], out=one[:-1])
        np.maximum(one[:-_PADDED], one[_PADDED:], out=largest[:-_PADDED])
        np.minimum(flat[:-1], flat[1:], out=one[:-1])
        np.minimum(one[:-2], one[2:], out=other[:-2])
        np.minimum(other[:-_PADDED], other[_PADDED:], out=one[:-_PADDED])
        np.minimum(one[: -2 * _PADDED], one[2 * _PADDED :], out=other[: -2 * _PADDED])
        inner = _PADDED + 1
        other *= np.float32(b / (1 + b - c))
        np.subtract(largest[inner:], other[:-inner], out=one[:-inner])
        # Rounding errors: 2^-24 in float32, and 16 values are added.
        slack = np.float32(1e-5) * max(top.max(), -maps.min())
        limit = (known - slack - np.float32(c) * top) / np.float32(1 + b - c)
        chosen = one.reshape(len(maps), -1) >= limit[:, None]
        chosen &= np.outer(self._rows.is_used, self._columns.is_used).reshape(-1)
        chosen = chosen.reshape(-1)
        chosen[peaks] = True
        return np.flatnonzero(chosen)

    def _interpolate(self, intervals: NDArray[np.intp]) -> NDArray[np.float32]:
        """Compute the pixels ``[P, Q, C]`` of C intervals, some of them repeated."""
        row, column = np.divmod(intervals % _PADDED**2, _PADDED)
        # take() keeps the intervals contiguous in memory; indexing would not.
        down, across = self._rows.weights.take(row, 2), self._columns.weights.take(column, 2)
        cells = self._flat[intervals + _NEIGHBOURS]
        narrow = cells[0] * down[0][:, None]  # [P, 4, C]
        for tap in range(1, 4):
            narrow += cells[tap] * down[tap][:, None]
        values: NDArray[np.float32] = narrow[:, :1] * across[0]
        for tap in range(1, 4):
            values += narrow[:, tap : tap + 1] * across[tap]
        return values


_NEIGHBOURS = (np.arange(4)[:, None] * _PADDED + np.arange(4))[:, :, None]
"""Where the 16 cells of an interval lie, from the first."""


def _softmax(maps: NDArray[np.float32]) -> NDArray[np.float32]:
    flat = maps.reshape(len(maps), -1)
    mass: NDArray[np.float32] = flat - flat.max(axis=1, keepdims=True)
    np.exp(mass, out=mass)
    mass /= mass.sum(axis=1, keepdims=True)
    return mass.reshape(maps.shape)


def _most_likely(probabilities: NDArray[np.float32], blur_cells: float) -> NDArray[np.float32]:
    """Find the largest blurred probability of each map: ``[K, 2]``, x and y in cells.

    Between cells, it is where the parabola through the logarithms of the largest value and its two
    neighbours is the largest, which is exact for a Gaussian.
    """
    kernel = _gaussian(blur_cells)
    blurred = kernel @ probabilities @ kernel
    row, column = np.divmod(blurred.reshape(len(blurred), -1).argmax(axis=1), HEATMAP_SIZE)
    k = np.arange(len(blurred))
    lines = blurred[k, row], blurred[k, :, column]
    found = np.empty((len(blurred), 2), np.float32)
    for axis, (line, cell) in enumerate(zip(lines, (column, row), strict=True)):
        inner = cell.clip(1, HEATMAP_SIZE - 2)  # a cell at the border has one neighbour only
        before, at, after = np.log(line[k[:, None], inner[:, None] + np.arange(-1, 2)]).T
        bend = 2 * at - before - after
        shift = np.divide(after - before, 2 * bend, out=np.zeros_like(at), where=bend > 0)
        found[:, axis] = cell + 0.5 + np.where(inner == cell, shift.clip(-0.5, 0.5), 0)
    return found


@functools.lru_cache(maxsize=8)
def _gaussian(deviation: float) -> NDArray[np.float32]:
    """Return ``[56, 56]``, the filter's weight between each two cells of a line."""
    cells = np.arange(HEATMAP_SIZE)
    distance = (cells[:, None] - cells) / deviation
    weights: NDArray[np.float32] = np.exp(-(distance**2) / 2).astype(np.float32)
    return weights


def _probability(
    probabilities: NDArray[np.float32], points: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Sum the cells around each point, ``[K, 2]`` in cells."""
    cell = points.astype(np.intp).clip(0, HEATMAP_SIZE - 1)
    around = np.arange(-_RADIUS, _RADIUS + 1)
    x, y = cell[:, :1] + around, cell[:, 1:] + around
    inside = (y >= 0) & (y < HEATMAP_SIZE), (x >= 0) & (x < HEATMAP_SIZE)
    k = np.arange(len(probabilities))[:, None, None]
    near = probabilities[k, y[:, :, None] % HEATMAP_SIZE, x[:, None] % HEATMAP_SIZE]
    near *= inside[0][:, :, None] & inside[1][:, None]
    share: NDArray[np.float32] = near.sum(axis=(1, 2))
    return np.minimum(share, np.float32(1))
