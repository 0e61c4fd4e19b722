"""Keypoints: the named points of a body, and their positions from a network's heatmaps."""

from __future__ import annotations

from functools import cached_property
from typing import Annotated

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

HEATMAP_SIZE = 56
"""Side of a keypoint's heatmap in cells (He et al., Mask R-CNN, section 5)."""

_CELLS = HEATMAP_SIZE + 1
"""Intervals between the centres of neighbouring cells, those beyond the border included."""
_CUBIC = -0.75
"""Keys' parameter of cubic convolution, as torch and OpenCV choose it."""
_POSITIVE, _NEGATIVE = 1.1875, -0.1875
"""Largest sum of the positive weights of four taps, half way between two cells, and the rest."""
_RADIUS = 3
"""The score counts the cells up to this far from the keypoint's own."""
_BLOCK = 64
"""Rows and columns that are interpolated at once. OpenBLAS computes larger products on several
threads, which wait for one another in loops: with the cores in use, a hundred times as long."""

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
            raise ValueError(f"the skeleton joins a keypoint that is none of {len(self.names)}")

    def __len__(self) -> int:
        return len(self.names)

    @cached_property
    def mirrored(self) -> tuple[int, ...]:
        """Index of the point that each one becomes in a mirror: "left_eye" and "right_eye" swap."""
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
    heatmaps: NDArray[np.float32], boxes: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Find each keypoint and how certain it is.

    The position is torchvision's, see ``find_peaks``. torchvision's score, the logit there, has no
    fixed scale. The score here is a probability: softmax over the heatmap, which the network is
    trained with, summed over the 7 x 7 cells around the keypoint, an eighth of the box each way. It
    is the network's estimate that the point, if it can be seen at all, lies there.

    Args:
        heatmaps: ``[N, K, 56, 56]`` float32 logits, finite.
        boxes: ``[N, 4]`` float32, x1 y1 x2 y2 in pixels, finite: where each heatmap lies.

    Returns:
        ``[N, K, 3]`` float32: x and y in pixels of the boxes' frame, the score in 0..1.
    """
    points = find_peaks(heatmaps, boxes)
    for found, maps, box in zip(points, heatmaps, boxes, strict=True):
        found[:, 2] = _probability(maps, found[:, :2], box)
    return points


def find_peaks(heatmaps: NDArray[np.float32], boxes: NDArray[np.float32]) -> NDArray[np.float32]:
    """Find the largest value of each heatmap after bicubic upsampling to its box's pixels.

    It is what ``heatmaps_to_keypoints`` of torchvision (roi_heads.py) finds: a box has at least one
    pixel each way, a fraction of a pixel counts as one, and a position is the centre of a pixel.
    Only the part of a heatmap in which the largest value can lie is upsampled.

    Args:
        heatmaps: as for ``decode_heatmaps``.
        boxes: likewise.

    Returns:
        ``[N, K, 3]`` float32: x and y in pixels of the boxes' frame, the value there.
    """
    points = np.zeros((*heatmaps.shape[:2], 3), np.float32)
    for found, maps, box in zip(points, heatmaps, boxes, strict=True):
        sides = np.maximum(box[2:] - box[:2], np.float32(1))
        columns, rows = (_Taps(int(np.ceil(side))) for side in sides)
        chosen = _candidates(maps, rows, columns)
        chosen_rows = chosen.max(axis=2)[:, rows.cell]  # [K, pixels]
        chosen_columns = chosen.max(axis=1)[:, columns.cell]
        for k, heatmap in enumerate(maps):
            y, x = np.flatnonzero(chosen_rows[k]), np.flatnonzero(chosen_columns[k])
            found[k] = _peak(heatmap, y, rows.weights[y], x, columns.weights[x])
        found[:, :2] += np.float32(0.5)
        found[:, :2] *= sides / np.array([len(columns), len(rows)], np.float32)
        found[:, :2] += box[:2]
    return points


class _Taps:
    """Cubic interpolation from the 56 cells to the pixels of one side of a box.

    Attributes:
        cell: ``[S]`` int, ascending: in which interval between two cell centres each pixel lies;
            0 is beyond the first.
        weights: ``[S, 56]`` float32 of each cell in each pixel; cells beyond the border repeat it.
    """

    def __init__(self, size: int) -> None:
        position = (np.arange(size, dtype=np.float32) + np.float32(0.5)) * np.float32(
            HEATMAP_SIZE / size
        ) - np.float32(0.5)
        below = np.floor(position)
        t = position - below
        self.cell = below.astype(np.intp) + 1
        self.weights = np.zeros((size, HEATMAP_SIZE), np.float32)
        pixels = np.arange(size)
        for tap, distance in enumerate((t + 1, t, 1 - t, 2 - t)):
            source = np.clip(self.cell + tap - 2, 0, HEATMAP_SIZE - 1)
            self.weights[pixels, source] += _cubic(distance, is_near=tap in (1, 2))

    def __len__(self) -> int:
        return len(self.cell)

    def nearest(self, source: NDArray[np.intp]) -> NDArray[np.intp]:
        """Find the pixel nearest to the centre of each cell."""
        pixel = (source + 0.5) * len(self) / HEATMAP_SIZE - 0.5
        return np.clip(np.rint(pixel).astype(np.intp), 0, len(self) - 1)


def _cubic(distance: NDArray[np.float32], *, is_near: bool) -> NDArray[np.float32]:
    """Evaluate Keys' kernel at a distance of up to 1 cell, or of 1 to 2."""
    a = np.float32(_CUBIC)
    x = distance
    if is_near:
        near: NDArray[np.float32] = ((a + 2) * x - (a + 3)) * x * x + 1
        return near
    far: NDArray[np.float32] = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return far


def _candidates(maps: NDArray[np.float32], rows: _Taps, columns: _Taps) -> NDArray[np.bool_]:
    """Find the intervals ``[K, 57, 57]`` in which the largest interpolated value may lie.

    Between four cell centres it is a weighted sum of 16 cells; with their largest value M and
    smallest m it is at most ``p * M - n * m``, where p and n are the largest sums of the positive
    and the negative weights. Where that is less than one interpolated value that is known, the
    largest cannot lie.
    """
    flat = maps.reshape(len(maps), -1).argmax(axis=1)
    y, x = np.divmod(flat, HEATMAP_SIZE)
    across, down = columns.weights[columns.nearest(x)], rows.weights[rows.nearest(y)]
    known = ((down[:, None] @ maps) @ across[:, :, None]).reshape(-1, 1, 1)
    padded = np.pad(maps, ((0, 0), (2, 2), (2, 2)), mode="edge")
    largest = _of_sixteen(np.maximum, padded)
    smallest = _of_sixteen(np.minimum, padded)
    p = _POSITIVE**2 + _NEGATIVE**2
    n = -2 * _POSITIVE * _NEGATIVE
    largest *= np.float32(p)
    smallest *= np.float32(n)
    largest -= smallest
    # Rounding: float32 has 2^-24, and 16 values are added.
    slack = np.float32(1e-5) * np.abs(maps).max(initial=0)
    chosen: NDArray[np.bool_] = largest >= known - slack
    return chosen


def _of_sixteen(extreme: np.ufunc, padded: NDArray[np.float32]) -> NDArray[np.float32]:
    """Reduce each 4 x 4 neighbourhood: ``[K, 60, 60]`` to ``[K, 57, 57]``."""
    two = extreme(padded[:, :-1], padded[:, 1:])
    four = extreme(two[:, :-2], two[:, 2:])
    two = extreme(four[:, :, :-1], four[:, :, 1:])
    reduced: NDArray[np.float32] = extreme(two[:, :, :-2], two[:, :, 2:])
    return reduced


def _peak(
    heatmap: NDArray[np.float32],
    y: NDArray[np.intp],
    down: NDArray[np.float32],
    x: NDArray[np.intp],
    across: NDArray[np.float32],
) -> tuple[float, float, float]:
    """Interpolate at some rows and columns of pixels: x, y and the value of the largest.

    Args:
        heatmap: ``[56, 56]``.
        y: ``[H]``, the rows.
        down: ``[H, 56]``, their weights.
        x: ``[W]``, the columns.
        across: ``[W, 56]``, their weights.
    """
    best = (0.0, 0.0, -np.inf)
    for left in range(0, len(x), _BLOCK):
        narrow = heatmap @ across[left : left + _BLOCK].T
        for top in range(0, len(y), _BLOCK):
            values = down[top : top + _BLOCK] @ narrow
            row, column = divmod(int(values.argmax()), values.shape[1])
            if values[row, column] > best[2]:
                best = (x[left + column], y[top + row], values[row, column])
    return best


def _probability(
    maps: NDArray[np.float32], points: NDArray[np.float32], box: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Sum softmax over the cells around each point."""
    sides = np.maximum(box[2:] - box[:2], np.float32(1))
    cell = ((points - box[:2]) * HEATMAP_SIZE / sides).astype(np.intp).clip(0, HEATMAP_SIZE - 1)
    mass = np.exp(maps - maps.max(axis=(1, 2), keepdims=True))
    around = np.arange(-_RADIUS, _RADIUS + 1)
    x, y = cell[:, :1] + around, cell[:, 1:] + around
    inside = (y >= 0) & (y < HEATMAP_SIZE), (x >= 0) & (x < HEATMAP_SIZE)
    k = np.arange(len(maps))[:, None, None]
    near = mass[k, y[:, :, None] % HEATMAP_SIZE, x[:, None] % HEATMAP_SIZE]
    near *= inside[0][:, :, None] & inside[1][:, None]
    share: NDArray[np.float32] = near.sum(axis=(1, 2)) / mass.sum(axis=(1, 2))
    return np.minimum(share, np.float32(1))
