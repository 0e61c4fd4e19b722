"""NetworkImage: an image as the network takes it, and the way back to source pixels."""

from __future__ import annotations

import threading
from functools import partial

import av
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter
from numpy.typing import NDArray

from maskcast.engines.bundle import Input
from maskcast.engines.planes import Planes, read_planes

_thread = threading.local()


class NetworkImage:
    """An image, resized and padded to the shape of a network's input.

    Attributes:
        pixels: ``[H, W, 3]`` uint8 RGB, C-contiguous. H and W are multiples of 32. The image
            lies at the top left; right of it and below it is padding.
        content: height and width of the image inside ``pixels``.
        source: height and width of the image before it was resized.
    """

    __slots__ = ("_pixels", "content", "source")

    def __init__(
        self, pixels: NDArray[np.uint8], content: tuple[int, int], source: tuple[int, int]
    ) -> None:
        self._pixels: NDArray[np.uint8] | None = pixels
        self.content = content
        self.source = source

    @property
    def pixels(self) -> NDArray[np.uint8]:
        """The pixels; see the class."""
        assert self._pixels is not None
        return self._pixels

    @property
    def shape(self) -> tuple[int, int]:
        """H and W."""
        height, width, _ = self.pixels.shape
        return height, width


class PlanarImage(NetworkImage):
    """A decoded image that the engine resizes and converts on its device.

    Attributes:
        planes: the decoded image.
        pixels: as in ``NetworkImage``; libswscale makes them when they are first read.
    """

    __slots__ = ("_fit", "_shape", "planes")

    def __init__(self, planes: Planes, frame: av.VideoFrame, rotation: int, shape: Input) -> None:
        self.planes = planes
        self.source = _upright_size(frame, rotation)
        self._shape, self.content = shape.shape(*self.source)
        self._pixels = None
        self._fit = partial(fit_image, frame, rotation, shape)

    @property
    def pixels(self) -> NDArray[np.uint8]:
        """The pixels; see the class."""
        if self._pixels is None:
            self._pixels = self._fit().pixels
        return self._pixels

    @property
    def shape(self) -> tuple[int, int]:
        """H and W."""
        return self._shape


def fit_planes(frame: av.VideoFrame, rotation: int, shape: Input, max_bytes: int) -> NetworkImage:
    """Leave resizing and conversion to the engine if the image has planes of up to ``max_bytes``.

    The other arguments are those of ``fit_image``, which handles all other images.
    """
    planes = read_planes(frame, rotation)
    if planes is None or planes.byte_count > max_bytes:
        return fit_image(frame, rotation, shape)
    return PlanarImage(planes, frame, rotation, shape)


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
    """Return height and width of an image after its rotation."""
    is_sideways = rotation // 90 % 2 == 1
    return (frame.width, frame.height) if is_sideways else (frame.height, frame.width)


def _interpolation(frame: av.VideoFrame, rows: int, columns: int) -> Interpolation:
    # Averaging over areas uses every pixel of an image that shrinks, but repeats pixels when an
    # image grows.
    shrinks = rows <= frame.height and columns <= frame.width
    return Interpolation.AREA if shrinks else Interpolation.BILINEAR


def _reformatter() -> VideoReformatter:
    """Return the thread's own scaler, which keeps its tables from image to image."""
    if not hasattr(_thread, "reformatter"):
        _thread.reformatter = VideoReformatter()
    reformatter: VideoReformatter = _thread.reformatter
    return reformatter


def _pixels(rgb: av.VideoFrame) -> NDArray[np.uint8]:
    """View an rgb24 image as ``[h, w, 3]``, without the padding of its rows."""
    plane = rgb.planes[0]
    rows = np.frombuffer(memoryview(plane), np.uint8).reshape(rgb.height, plane.line_size)
    return rows[:, : rgb.width * 3].reshape(rgb.height, rgb.width, 3)
