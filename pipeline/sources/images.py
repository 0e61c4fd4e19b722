"""ImageSource: a folder of images, or one image."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import av

from maskcast.engines.errors import InputError
from maskcast.engines.image_file import read_image
from maskcast.pipeline.config import SourceConfig
from maskcast.pipeline.frame import Frame, Timeline
from maskcast.pipeline.sources.source import Source
from maskcast.pipeline.url import local_path

IMAGE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})


class ImageSource(Source):
    """The images of a folder in the order of their names, or one image; upright, as EXIF says.

    An image of a folder that cannot be read is skipped and counted in ``corrupt``.

    Raises:
        InputError: the folder holds no readable image, or the one image cannot be read.
    """

    def __init__(self, config: SourceConfig) -> None:
        super().__init__(config)
        path = local_path(config.url)
        self._paths = _images(path)
        self._loop = config.loop
        self._index = 0
        self._frames = self._read()
        first = next(self._frames, None)
        if first is None:
            raise InputError(
                f"{path}: none of its {len(self._paths)} images can be read"
                if path.is_dir()
                else f"{path}: not an image that can be read"
            )
        self._first = first
        self.live = False
        self.fps = None
        self.width, self.height = first.picture.width, first.picture.height
        self.frame_count = None if config.loop else len(self._paths)

    def __iter__(self) -> Iterator[Frame]:
        for frame in chain([self._first], self._frames):
            if self._stopping.is_set():
                return
            yield frame

    def close(self) -> None:
        """Nothing is held open between two images."""

    def _read(self) -> Iterator[Frame]:
        while True:
            for path in self._paths:
                timeline = Timeline()
                timeline.begin("decode")
                try:
                    picture = read_picture(path)
                except InputError:
                    self.corrupt += 1
                    continue
                timeline.end("decode")
                yield Frame(
                    self.name, self._index, None, time.time_ns(), picture, timeline=timeline
                )
                self._index += 1
            if not self._loop or self._index == 0:
                return


def read_picture(path: Path) -> av.VideoFrame:
    """Read an image file as an upright RGB picture.

    Raises:
        InputError: it is missing or cannot be read.
    """
    return av.VideoFrame.from_ndarray(read_image(path), "rgb24")


def _images(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    try:
        images = sorted(file for file in path.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    if not images:
        kinds = ", ".join(sorted(IMAGE_SUFFIXES))
        raise InputError(f"{path}: the folder holds no images ({kinds})")
    return images
