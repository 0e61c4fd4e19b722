"""Planes: decoded images in 8-bit YUV 4:2:0, and their conversion to RGB."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import av
import numpy as np
from numpy.typing import NDArray

_PIXEL_FORMATS = frozenset({"yuv420p", "yuvj420p", "nv12"})

_FULL_RANGE = 2
"""FFmpeg's AVCOL_RANGE_JPEG: 0..255; every other value means 16..235 and 16..240."""

_BT601, _BT709, _BT2020 = (0.299, 0.114), (0.2126, 0.0722), (0.2627, 0.0593)
"""The shares of red and blue in the luma (ITU-R BT.601, BT.709, BT.2020)."""

_MATRICES = {1: _BT709, 2: _BT601, 5: _BT601, 6: _BT601, 9: _BT2020}
"""By FFmpeg's AVColorSpace. Unspecified is BT.601, as libswscale takes it."""


class Conversion(NamedTuple):
    """YUV to RGB: red is ``luma_scale (Y - luma_offset) + v_to_red (V - 128)``, and so on."""

    luma_offset: float
    luma_scale: float
    v_to_red: float
    u_to_green: float
    v_to_green: float
    u_to_blue: float


@dataclass(frozen=True, slots=True)
class Planes:
    """An image as a decoder gives it. Its arrays are views of the decoder's memory.

    Attributes:
        arrays: uint8, Y ``[H, W]``, then U and V, ``[h, w]`` each, or interleaved ``[h, 2 w]``
            (NV12), with h and w half of H and W, rounded up. Rows may be padded in memory.
        turns: quarter turns counter-clockwise that make it upright.
        conversion: of its values to RGB, 0..255.
        chroma_shift: how far left of the middle of its four pixels a chroma sample lies, in chroma
            samples: 0.25 in H.264, H.265 and AV1 as cameras send them, 0 in JPEG.
    """

    arrays: tuple[NDArray[np.uint8], ...]
    turns: int
    conversion: Conversion
    chroma_shift: float = 0.25

    @property
    def height(self) -> int:
        """Height of the luma, before the image is rotated."""
        return len(self.arrays[0])

    @property
    def width(self) -> int:
        """Width of the luma, before the image is rotated."""
        return int(self.arrays[0].shape[1])

    @property
    def byte_count(self) -> int:
        """Size of the planes without padding."""
        return sum(array.size for array in self.arrays)


def read_planes(frame: av.VideoFrame, rotation: int) -> Planes | None:
    """Return the planes of a decoded image; None if it is not 8-bit YUV 4:2:0 of a known matrix.

    Args:
        frame: the decoded image.
        rotation: degrees counter-clockwise by which to turn it (0, 90, 180, 270).
    """
    matrix = _MATRICES.get(frame.colorspace)
    name = frame.format.name
    if matrix is None or name not in _PIXEL_FORMATS:
        return None
    height, width = -(-frame.height // 2), -(-frame.width // 2)
    if name == "nv12":
        sizes = [(frame.height, frame.width), (height, 2 * width)]
    else:
        sizes = [(frame.height, frame.width), (height, width), (height, width)]
    arrays = []
    for plane, (rows, columns) in zip(frame.planes, sizes, strict=True):
        if plane.line_size < columns:  # negative if the image is upside down
            return None
        memory = np.frombuffer(memoryview(plane), np.uint8)
        arrays.append(memory.reshape(rows, plane.line_size)[:, :columns])
    is_full = frame.color_range == _FULL_RANGE or name == "yuvj420p"
    return Planes(tuple(arrays), rotation // 90 % 4, conversion(*matrix, is_full_range=is_full))


def conversion(red: float, blue: float, *, is_full_range: bool) -> Conversion:
    """Return the conversion for shares of red and blue in the luma (ITU-T H.273, 8.3)."""
    green = 1 - red - blue
    scale = 1.0 if is_full_range else 255 / 224
    return Conversion(
        luma_offset=0.0 if is_full_range else 16.0,
        luma_scale=1.0 if is_full_range else 255 / 219,
        v_to_red=2 * (1 - red) * scale,
        u_to_green=-2 * blue * (1 - blue) / green * scale,
        v_to_green=-2 * red * (1 - red) / green * scale,
        u_to_blue=2 * (1 - blue) * scale,
    )
