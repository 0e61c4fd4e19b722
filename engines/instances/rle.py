"""RLE: masks as COCO's run lengths, compressed and uncompressed, compatible with pycocotools.

A mask is read down its columns; the runs are of background and object alternately, background
first.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from maskcast.engines.instances.masks import Crossings, Patch

MAX_GROUPS = 7
"""Maximum number of 5-bit groups of a number: 34 bits and a sign, more than any image needs."""


def encode_runs(crossings: Crossings, width: int, height: int) -> NDArray[np.int64]:
    """Find COCO's uncompressed RLE (``rleEncode`` in pycocotools) of a mask in its image.

    Args:
        crossings: where the mask begins and ends in each column.
        width: the image's, pixels.
        height: likewise.

    Returns:
        ``[R]`` int64 run lengths; their sum is ``width * height``.
    """
    # An object that touches the bottom of one column and the top of the next is one run: its two
    # crossings there have the same position and cancel.
    turns, times = np.unique(crossings.column * height + crossings.row, return_counts=True)
    ends = np.append(turns[times % 2 == 1], width * height)
    runs: NDArray[np.int64] = np.diff(ends, prepend=0)
    return runs if runs[-1] else runs[:-1]


def decode_runs(runs: NDArray[np.int64], width: int, height: int) -> Patch:
    """Undo ``encode_runs``: the smallest patch that holds the object.

    Args:
        runs: ``[R]`` int64, none negative, of sum ``width * height``.
        width: the image's, pixels.
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
    """Compress the runs of many masks to COCO's ``counts`` (``rleToString`` in pycocotools).

    From the fourth run on, the difference to the run before the last is written; each number in
    groups of five bits, low group first, sign-extended, with a sixth bit for "more" and 48 added.
    """
    if not runs:
        return []
    numbers = np.concatenate([part for r in runs for part in (r[:3], r[3:] - r[1:-2])])
    count = len(numbers)
    codes = np.zeros((count, MAX_GROUPS), dtype=np.uint8)
    groups = np.zeros(count, dtype=np.int64)  # of each number
    alive = np.arange(count)
    for place in range(MAX_GROUPS):
        rest = numbers >> 5
        more = rest != -(numbers >> 4 & 1)  # something but the sign is left
        codes[alive, place] = (numbers & 0x1F) + 48 + 0x20 * more
        groups[alive] += 1
        alive, numbers = alive[more], rest[more]
    text = codes[np.arange(MAX_GROUPS) < groups[:, None]].tobytes()
    ends = np.cumsum(groups)[np.cumsum([len(r) for r in runs]) - 1].tolist()
    return [text[a:b] for a, b in zip([0, *ends[:-1]], ends, strict=True)]


def decompress_runs(counts: bytes, pixels: int) -> NDArray[np.int64]:
    """Undo ``compress_runs`` for one mask.

    Args:
        counts: the compressed string.
        pixels: width x height of the image.

    Raises:
        ValueError: ``counts`` is not the code of a mask of that many pixels.
    """
    codes = np.frombuffer(counts, dtype=np.uint8).astype(np.int64) - 48
    if not len(codes) or codes.min() < 0 or codes.max() > 0x3F:
        raise ValueError("a character of the counts is not one of COCO's")
    last = np.flatnonzero(codes < 0x20)
    if not len(last) or last[-1] != len(codes) - 1:
        raise ValueError("the counts end inside a number")
    first = np.concatenate([[0], last[:-1] + 1])
    size = last - first + 1
    if size.max() > MAX_GROUPS:
        raise ValueError("a number in the counts is too large")
    place = np.arange(len(codes)) - np.repeat(first, size)
    runs = np.add.reduceat((codes & 0x1F) << (5 * place), first)
    runs -= ((codes[last] & 0x10) != 0).astype(np.int64) << (5 * size)
    runs[1::2] = np.cumsum(runs[1::2])
    runs[2::2] = np.cumsum(runs[2::2])
    # With at most MAX_GROUPS groups, the sums before this check cannot overflow.
    if runs.min() < 0 or runs.max() > pixels or runs.sum() != pixels:
        raise ValueError(f"the runs do not fill an image of {pixels} pixels")
    return runs
