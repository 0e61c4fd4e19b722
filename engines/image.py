"""NetworkImage: a picture as the network takes it, and the way back to source pixels."""

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
    """A picture, resized and padded to the shape of a network's input.

    Attributes:
        pixels: ``[H, W, 3]`` uint8 RGB, C-contiguous. H and W are multiples of 32. The picture
            lies at the top left; right of it and below it is padding.
        content: height and width of the picture inside ``pixels``.
        source: height and width of the picture before it was resized.
    """

    pixels: NDArray[np.uint8]
    content: tuple[int, int]
    source: tuple[int, int]


def fit_image(picture: av.VideoFrame, rotation: int, shape: Input) -> NetworkImage:
    """Resize a decoded picture to a network's input, convert it to RGB, turn it upright and pad it.

    Resizing and conversion are one pass of libswscale, at the decoder's own pixel format, colour
    space and range.

    Args:
        picture: of any pixel format that libswscale reads.
        rotation: degrees counter-clockwise that it must be turned (0, 90, 180, 270).
        shape: the ``input`` of a bundle's manifest.

    Raises:
        av.error.FFmpegError: the picture cannot be converted.
    """
    turns = rotation // 90 % 4
    source = _upright_size(picture, rotation)
    (height, width), content = shape.shape(*source)
    rows, columns = content[::-1] if turns % 2 else content
    rgb = _reformatter().reformat(
        picture,
        width=columns,
        height=rows,
        format="rgb24",
        interpolation=_interpolation(picture, rows, columns),
    )
    content_pixels = np.rot90(_pixels(rgb), turns)
    if content == (height, width):
        return NetworkImage(np.ascontiguousarray(content_pixels), content, source)
    pixels = np.full((height, width, 3), shape.pad_value, dtype=np.uint8)
    pixels[: content[0], : content[1]] = content_pixels
    return NetworkImage(pixels, content, source)


def input_shape(picture: av.VideoFrame, rotation: int, shape: Input) -> tuple[int, int]:
    """Return the height and width of the input that ``fit_image`` makes of a picture."""
    return shape.shape(*_upright_size(picture, rotation))[0]


def _upright_size(picture: av.VideoFrame, rotation: int) -> tuple[int, int]:
    """Height and width of a picture that has been turned."""
    lies = rotation // 90 % 2 == 1
    return (picture.width, picture.height) if lies else (picture.height, picture.width)


def _interpolation(picture: av.VideoFrame, rows: int, columns: int) -> Interpolation:
    # Averaging over areas takes in every pixel of a picture that shrinks; enlarging, it would
    # repeat pixels.
    shrinks = rows <= picture.height and columns <= picture.width
    return Interpolation.AREA if shrinks else Interpolation.BILINEAR


def _reformatter() -> VideoReformatter:
    """Get the thread's own scaler: its tables are kept from picture to picture."""
    if not hasattr(_thread, "reformatter"):
        _thread.reformatter = VideoReformatter()
    reformatter: VideoReformatter = _thread.reformatter
    return reformatter


def _pixels(rgb: av.VideoFrame) -> NDArray[np.uint8]:
    """View an rgb24 picture as ``[h, w, 3]``, without the padding of its rows."""
    plane = rgb.planes[0]
    rows = np.frombuffer(memoryview(plane), np.uint8).reshape(rgb.height, plane.line_size)
    return rows[:, : rgb.width * 3].reshape(rgb.height, rgb.width, 3)
