"""Source: where frames come from."""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from types import TracebackType
from typing import Self

from maskcast.engines.errors import InputError
from maskcast.pipeline.config import Policy, SourceConfig
from maskcast.pipeline.frame import Frame
from maskcast.pipeline.url import source_name


class SourceLostError(Exception):
    """A source that had been open broke off: the world's fault, not the user's.

    The message says what happened and holds no credentials.
    """


class AccessDeniedError(InputError):
    """The source wants a user and password, or others."""


class Source(ABC):
    """An open source: iterate over it, once, for its frames.

    It belongs to the thread that iterates; only ``stop`` may be called from another one.

    Attributes:
        name: its name in topics and tables.
        live: whether its pictures come at their own pace (a camera) or when asked for (a file).
        policy: what happens to a frame that comes while the one before it still waits.
        fps: nominal pictures per second, None where unknown.
        width, height: size of the first picture, pixels, before rotation. Later ones may differ.
        frame_count: how many pictures there are, None where unknown or endless.
        corrupt: damaged packets or images skipped so far.
    """

    name: str
    live: bool
    fps: float | None
    width: int
    height: int
    frame_count: int | None

    def __init__(self, config: SourceConfig) -> None:
        self.name = config.name or source_name(config.url)
        self.corrupt = 0
        self._asked_policy = config.policy
        self._stopping = threading.Event()

    @property
    def policy(self) -> Policy:
        """The policy asked for, else ``latest`` for live sources and ``block`` for the rest."""
        return self._asked_policy or ("latest" if self.live else "block")

    @abstractmethod
    def __iter__(self) -> Iterator[Frame]:
        """Yield frames until the source ends or is stopped.

        Raises:
            SourceLostError: it broke off.
        """

    def stop(self) -> None:
        """Ask, from any thread, that the iteration ends at the next picture."""
        self._stopping.set()

    @abstractmethod
    def close(self) -> None:
        """Give back files, sockets and decoders. Closing twice is safe."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class Pace:
    """Holds pictures back until the wall clock reaches their time, as a camera's shutter would."""

    def __init__(self, stopping: threading.Event) -> None:
        self._stopping = stopping
        self._epoch_s: float | None = None

    def wait(self, at_s: float) -> None:
        """Sleep until ``at_s`` seconds of the stream; the first call sets the stream's epoch.

        A reader that has fallen behind does not sleep.
        """
        now_s = time.monotonic()
        if self._epoch_s is None:
            self._epoch_s = now_s - at_s
        self._stopping.wait(max(0.0, self._epoch_s + at_s - now_s))
