"""ImageSource: a folder of images, or a single image."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import av

from maskcast.engines.errors import InputError
from maskcast.engines.image_file import read_image
from maskcast.pipeline.configuration.config import SourceConfig
from maskcast.pipeline.frame import Frame, Timeline
from maskcast.pipeline.log import fields
from maskcast.pipeline.sources.files import IMAGE_SUFFIXES, list_files
from maskcast.pipeline.sources.source import Source, SourceLostError, oversize
from maskcast.pipeline.url import local_path, shorten

DEFAULT_FPS = 25.0
"""Frame rate of a folder of images for which the configuration gives none."""

_logger = logging.getLogger(__name__)


class ImageSource(Source):
    """The images of a folder, sorted by name, or a single image, rotated according to EXIF.

    Presentation times are ``index / fps``. An image in a folder that cannot be read or has been
    deleted is skipped, counted in ``corrupt``, and logged the first time.
    """

    def __init__(self, config: SourceConfig, stopping: threading.Event | None = None) -> None:
        super().__init__(config, stopping)
        self.fps = config.fps or DEFAULT_FPS
        self._path = local_path(config.url)
        self._index = 0
        self._unreadable: set[Path] = set()
        self._first: Iterator[Frame] = iter(())
        self._frames: Iterator[Frame] = iter(())

    def open(self) -> None:
        """Read the names of the images and the first image.

        Raises:
            InputError: the folder has no readable image, or the single image cannot be read.
        """
        paths = list_files(self._path, IMAGE_SUFFIXES)
        self._frames = self._read(paths)
        first = next(self._frames, None)
        if first is None:
            raise InputError(f"{self._path}: none of its {len(paths)} images can be read")
        self.width, self.height = first.decoded.width, first.decoded.height
        self.frame_count = None if self._config.loop else len(paths)
        self._first = iter([first])  # an iterator releases the frame once it is yielded

    def __iter__(self) -> Iterator[Frame]:
        yield from self._play(chain(self._first, self._frames))

    def close(self) -> None:
        """Do nothing: no file is open between two images."""

    def _read(self, paths: list[Path]) -> Iterator[Frame]:
        while True:
            index_before = self._index
            for path in paths:
                if self._stopping.is_set():
                    return
                try:
                    yield self._load(path)
                except InputError as error:
                    if not self._path.is_dir() and not self._index:
                        raise
                    self._skip(path, error)
                else:
                    self._index += 1
            if not self._config.loop or self._index == 0:
                return
            if self._index == index_before:
                raise SourceLostError(f"{self._path}: none of its images can be read any more")

    def _load(self, path: Path) -> Frame:
        timeline = Timeline()
        timeline.begin("decode")
        decoded = decode_image(path)
        timeline.end("decode")
        assert self.fps is not None
        return Frame(
            source=self.name,
            index=self._index,
            pts_s=self._index / self.fps,
            capture_ns=time.time_ns(),
            decoded=decoded,
            timeline=timeline,
            file=path.name,
        )

    def _skip(self, path: Path, error: InputError) -> None:
        self.corrupt += 1
        if path not in self._unreadable:
            self._unreadable.add(path)
            shown = fields(source=self.name, file=path.name, reason=shorten(str(error)))
            _logger.warning("image_unreadable", extra=shown)


def decode_image(path: Path) -> av.VideoFrame:
    """Read an image file as an RGB image, rotated according to EXIF.

    Raises:
        InputError: it is missing, cannot be read, or is too large.
    """
    image = read_image(path)
    if problem := oversize(image.shape[1], image.shape[0]):
        raise InputError(f"{path}: {problem}")
    return av.VideoFrame.from_ndarray(image, "rgb24")
