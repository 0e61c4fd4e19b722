"""NetworkImage: an image as the network takes it, and the way back to source pixels."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import av
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter
from numpy.typing import NDArray

from maskcast.engines.bundle import Input

_thread = threading.local()


@dataclass(frozen=True, slots=True)
class NetworkImage:
    """An image, resized and padded to the shape of a network's input.

    Attributes:
        pixels: ``[H, W, 3]`` uint8 RGB, C-contiguous. H and W are multiples of 32. The image
            lies at the top left; right of it and below it is padding.
        content: height and width of the image inside ``pixels``.
        source: height and width of the image before it was resized.
    """

    pixels: NDArray[np.uint8]
    content: tuple[int, int]
    source: tuple[int, int]


def fit_image(frame: av.VideoFrame, rotation: int, shape: Input) -> NetworkImage:
    """Resize a decoded image to a network's input, convert it to RGB, turn it upright and pad it.

    Resizing and conversion are one pass of libswscale, at the decoder's own pixel format, colour
    space and range.

    Args:
        frame: of any pixel format that libswscale reads.
        rotation: degrees counter-clockwise by which to turn it (0, 90, 180, 270).
        shape: the ``input`` of a bundle's manifest.

    Raises:
        av.error.FFmpegError: the image cannot be converted.
    """
    turns = rotation // 90 % 4
    source = _upright_size(frame, rotation)
    (height, width), content = shape.shape(*source)
    rows, columns = content[::-1] if turns % 2 else content
    rgb = _reformatter().reformat(
        frame,
        width=columns,
        height=rows,
        format="rgb24",
        interpolation=_interpolation(frame, rows, columns),
    )
    content_pixels = np.rot90(_pixels(rgb), turns)
    if content == (height, width):
        return NetworkImage(np.ascontiguousarray(content_pixels), content, source)
    pixels = np.full((height, width, 3), shape.pad_value, dtype=np.uint8)
    pixels[: content[0], : content[1]] = content_pixels
    return NetworkImage(pixels, content, source)


def input_shape(frame: av.VideoFrame, rotation: int, shape: Input) -> tuple[int, int]:
    """Return the height and width of the input that ``fit_image`` makes of an image."""
    return shape.shape(*_upright_size(frame, rotation))[0]


def _upright_size(frame: av.VideoFrame, rotation: int) -> tuple[int, int]:
    """Height and width of an image that has been turned."""
    lies = rotation // 90 % 2 == 1
    return (frame.width, frame.height) if lies else (frame.height, frame.width)


def _interpolation(frame: av.VideoFrame, rows: int, columns: int) -> Interpolation:
    # Averaging over areas takes in every pixel of an image that shrinks; enlarging, it would
    # repeat pixels.
    shrinks = rows <= frame.height and columns <= frame.width
    return Interpolation.AREA if shrinks else Interpolation.BILINEAR


def _reformatter() -> VideoReformatter:
    """Get the thread's own scaler: its tables are kept from image to image."""
    if not hasattr(_thread, "reformatter"):
        _thread.reformatter = VideoReformatter()
    reformatter: VideoReformatter = _thread.reformatter
    return reformatter


def _pixels(rgb: av.VideoFrame) -> NDArray[np.uint8]:
    """View an rgb24 image as ``[h, w, 3]``, without the padding of its rows."""
    plane = rgb.planes[0]
    rows = np.frombuffer(memoryview(plane), np.uint8).reshape(rgb.height, plane.line_size)
    return rows[:, : rgb.width * 3].reshape(rgb.height, rgb.width, 3)
