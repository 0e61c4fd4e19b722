"""Source: the common interface of all frame sources."""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Self

from maskcast.engines.errors import InputError
from maskcast.pipeline.configuration.config import Policy, SourceConfig
from maskcast.pipeline.frame import MAX_SIDE, Frame
from maskcast.pipeline.url import source_name


class SourceLostError(Exception):
    """Reading an open source failed. The message is one line and contains no credentials."""


class AccessDeniedError(InputError):
    """The source requires a user and password, or rejected those in the URL."""


class Source(ABC):
    """A source of frames: construct it, ``open`` it, iterate over it once, ``close`` it.

    As a context manager it is opened on entry and closed on exit. A source belongs to the thread
    that iterates over it; other threads may only call ``stop``.

    Args:
        config: the source.
        stopping: an event that stops the source when it is set, from any thread.

    Attributes:
        name: its name in topics and tables.
        corrupt: damaged packets, or unreadable images, that were skipped so far.
        live: whether its frames arrive at their own rate (a camera) or on demand (a file).
        fps: nominal frames per second, None if unknown.
        width, height: size of the first frame in pixels, before rotation. Later ones may differ.
        frame_count: number of frames, None if unknown or endless.
        has_audio: whether there is audio, which is not read.

    All attributes except ``name`` and ``corrupt`` are set by ``open``.
    """

    def __init__(self, config: SourceConfig, stopping: threading.Event | None = None) -> None:
        self.name = config.name or source_name(config.url)
        self.corrupt = 0
        self.live = False
        self.fps: float | None = None
        self.width = self.height = 0
        self.frame_count: int | None = None
        self.has_audio = False
        self._config = config
        self._stopping = stopping or threading.Event()

    @property
    def policy(self) -> Policy:
        """The configured policy; by default ``latest`` for live sources, ``block`` for others."""
        return self._config.policy or ("latest" if self.live else "block")

    @abstractmethod
    def open(self) -> None:
        """Open the source and wait for its first frame.

        Raises:
            InputError: the source does not exist, cannot be read, or has no frames.
            SourceLostError: it was stopped before its first frame.
        """

    @abstractmethod
    def __iter__(self) -> Iterator[Frame]:
        """Yield frames until the source ends or is stopped.

        Raises:
            SourceLostError: reading failed.
        """

    def _play(self, frames: Iterable[Frame]) -> Iterator[Frame]:
        """Yield frames until the source is stopped; with ``latest`` play a file in real time."""
        pace = Pace(self._stopping) if self.policy == "latest" and not self.live else None
        for frame in frames:
            if pace is not None and frame.pts_s is not None:
                pace.wait(frame.pts_s)
                frame.restart_clock()
            if self._stopping.is_set():
                return
            yield frame

    def stop(self) -> None:
        """Stop the iteration before the next frame. Safe on any thread."""
        self._stopping.set()

    @abstractmethod
    def close(self) -> None:
        """Release files, sockets and decoders. Safe to call twice, or without ``open``."""

    def __enter__(self) -> Self:
        try:
            self.open()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def oversize(width: int, height: int) -> str:
    """Return why frames of this size, in pixels, are rejected; "" if they are accepted."""
    if max(width, height) <= MAX_SIDE:
        return ""
    return (
        f"its frames are {width}x{height} pixels, more than {MAX_SIDE} on a side; scale them down"
    )


class Pace:
    """Delays frames until the wall clock reaches their time, so that a file plays like a camera."""

    def __init__(self, stopping: threading.Event) -> None:
        self._stopping = stopping
        self._epoch_s: float | None = None

    def wait(self, at_s: float) -> None:
        """Wait until ``at_s``, seconds on the stream's clock; return early if it is stopped.

        The first call returns at once and relates the stream's clock to the wall clock.
        """
        now_s = time.monotonic()
        if self._epoch_s is None:
            self._epoch_s = now_s - at_s
        self._stopping.wait(max(0.0, self._epoch_s + at_s - now_s))
