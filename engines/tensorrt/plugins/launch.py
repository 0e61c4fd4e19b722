"""What each kernel is launched with: its arguments as the .cu file declares them, grid and block.

Pure: pointers go in as integers, nothing is launched here.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

FloatType = Literal["f32", "f16"]
Dim3 = tuple[int, int, int]

MAX_CANDIDATES = 8192
"""Most candidates an image that ``GroupedNms`` takes: 128 words of 64 in its last kernel."""
MAX_PICTURES = 16
"""Most pictures that one launch of the preprocess kernel takes."""
MAX_TAPS = 64
"""Most ``output_size * sampling_ratio`` that ``MultiscaleRoiAlign`` takes."""

_ALIGNMENT = 256
_WORD = 64


@dataclass(frozen=True, slots=True)
class Launch:
    """One kernel launch: the kernel's name, its single struct argument, grid and block."""

    kernel: str
    arguments: ctypes.Structure
    grid: Dim3
    block: Dim3


class RoiAlignArguments(ctypes.Structure):
    """``maskcast::RoiAlignArguments`` of multiscale_roi_align.cu."""

    _fields_ = (
        ("features", ctypes.c_void_p * 4),
        ("rois", ctypes.c_void_p),
        ("batch_index", ctypes.c_void_p),
        ("pooled", ctypes.c_void_p),
        ("heights", ctypes.c_int32 * 4),
        ("widths", ctypes.c_int32 * 4),
        ("images", ctypes.c_int32),
        ("boxes", ctypes.c_int32),
        ("channels", ctypes.c_int32),
        ("output_size", ctypes.c_int32),
        ("sampling_ratio", ctypes.c_int32),
        ("aligned", ctypes.c_int32),
        ("channels_per_block", ctypes.c_int32),
    )


class NmsArguments(ctypes.Structure):
    """``maskcast::NmsArguments`` of grouped_nms.cu."""

    _fields_ = (
        ("boxes", ctypes.c_void_p),
        ("scores", ctypes.c_void_p),
        ("groups", ctypes.c_void_p),
        ("keep", ctypes.c_void_p),
        ("overlaps", ctypes.c_void_p),
        ("sorted_boxes", ctypes.c_void_p),
        ("sorted_groups", ctypes.c_void_p),
        ("order", ctypes.c_void_p),
        ("images", ctypes.c_int32),
        ("candidates", ctypes.c_int32),
        ("max_output", ctypes.c_int32),
        ("iou_threshold", ctypes.c_float),
        ("score_threshold", ctypes.c_float),
    )


class _Picture(ctypes.Structure):
    _fields_ = (
        ("pixels", ctypes.c_void_p),
        ("height", ctypes.c_int32),
        ("width", ctypes.c_int32),
        ("content_height", ctypes.c_int32),
        ("content_width", ctypes.c_int32),
    )


class PreprocessArguments(ctypes.Structure):
    """``maskcast::PreprocessArguments`` of preprocess.cu."""

    _fields_ = (
        ("pictures", _Picture * MAX_PICTURES),
        ("images", ctypes.c_void_p),
        ("height", ctypes.c_int32),
        ("width", ctypes.c_int32),
        ("pad_value", ctypes.c_float),
    )


class Picture(NamedTuple):
    """An 8-bit RGB picture on the device, ``[height, width, 3]``, and the size it shall have."""

    pixels: int
    height: int
    width: int
    content_height: int
    content_width: int


def roi_align(
    features: Sequence[int],
    sizes: Sequence[tuple[int, int]],
    rois: int,
    batch_index: int,
    pooled: int,
    *,
    images: int,
    boxes: int,
    channels: int,
    output_size: int,
    sampling_ratio: int,
    aligned: bool,
    dtype: FloatType,
) -> Launch:
    """Pool ``boxes`` boxes from the levels P2..P5; see multiscale_roi_align.cu.

    Device pointers: ``features`` to P2..P5, each ``[images, channels, height, width]`` of ``dtype``
    with heights and widths in ``sizes``; ``rois`` ``[boxes, 4]`` float32; ``batch_index``
    ``[boxes]`` int32; ``pooled`` ``[boxes, channels, output_size, output_size]`` of ``dtype`` is
    written.
    """
    # About 3000 outputs a block: enough to pay for its taps, and enough blocks to fill any card.
    channels_per_block = max(1, min(channels, 3136 // output_size**2))
    arguments = RoiAlignArguments(
        features=(ctypes.c_void_p * 4)(*features),
        rois=rois,
        batch_index=batch_index,
        pooled=pooled,
        heights=(ctypes.c_int32 * 4)(*(height for height, _ in sizes)),
        widths=(ctypes.c_int32 * 4)(*(width for _, width in sizes)),
        images=images,
        boxes=boxes,
        channels=channels,
        output_size=output_size,
        sampling_ratio=sampling_ratio,
        aligned=int(aligned),
        channels_per_block=channels_per_block,
    )
    grid = (boxes, -(-channels // channels_per_block), 1)
    return Launch(f"multiscale_roi_align_{dtype}", arguments, grid, (256, 1, 1))


def nms_workspace_bytes(images: int, candidates: int) -> int:
    """Device memory that ``grouped_nms`` needs beside its inputs and output, bytes."""
    return sum(_nms_workspace(images, candidates))


def grouped_nms(
    boxes: int,
    scores: int,
    groups: int,
    keep: int,
    workspace: int,
    *,
    images: int,
    candidates: int,
    max_output: int,
    iou_threshold: float,
    score_threshold: float,
) -> list[Launch]:
    """Suppress what overlaps; three launches, to run in order. See grouped_nms.cu.

    Device pointers: ``boxes`` ``[images, candidates, 4]`` and ``scores`` ``[images, candidates]``
    float32, ``groups`` ``[images, candidates]`` int32; ``keep`` ``[images, max_output]`` int32 is
    written; ``workspace`` has ``nms_workspace_bytes(images, candidates)`` bytes, aligned to 256.
    """
    overlaps_bytes, boxes_bytes, groups_bytes, _ = _nms_workspace(images, candidates)
    sorted_boxes = workspace + overlaps_bytes
    sorted_groups = sorted_boxes + boxes_bytes
    arguments = NmsArguments(
        boxes=boxes,
        scores=scores,
        groups=groups,
        keep=keep,
        overlaps=workspace,
        sorted_boxes=sorted_boxes,
        sorted_groups=sorted_groups,
        order=sorted_groups + groups_bytes,
        images=images,
        candidates=candidates,
        max_output=max_output,
        iou_threshold=iou_threshold,
        score_threshold=score_threshold,
    )
    words = -(-candidates // _WORD)
    select = Launch("nms_select", arguments, (images, 1, 1), (512, 1, 1))
    if candidates == 0:
        return [select]
    return [
        Launch("nms_rank", arguments, (-(-candidates // 32), images, 1), (32, 8, 1)),
        Launch("nms_overlap", arguments, (-(-words // 4), words, images), (64, 4, 1)),
        select,
    ]


def preprocess(
    pictures: Sequence[Picture],
    images: int,
    *,
    height: int,
    width: int,
    pad_value: float,
    dtype: FloatType,
) -> Launch:
    """Resize and pad 1 to 16 pictures to ``[pictures, 3, height, width]``; see preprocess.cu."""
    arguments = PreprocessArguments(
        pictures=(_Picture * MAX_PICTURES)(*(_Picture(*picture) for picture in pictures)),
        images=images,
        height=height,
        width=width,
        pad_value=pad_value,
    )
    grid = (-(-width // 32), -(-height // 8), len(pictures))
    return Launch(f"preprocess_{dtype}", arguments, grid, (32, 8, 1))


def _nms_workspace(images: int, candidates: int) -> tuple[int, int, int, int]:
    """Bytes of overlaps, sorted boxes, sorted groups and order, each rounded up to 256."""
    rows = images * candidates
    words = -(-candidates // _WORD)

    def aligned(size: int) -> int:
        return -(-size // _ALIGNMENT) * _ALIGNMENT

    return aligned(rows * words * 8), aligned(rows * 16), aligned(rows * 4), aligned(rows * 4)
