"""Live sources, read on a thread."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

from witnesses import wait_until

from maskcast.pipeline.configuration.config import SourceConfig
from maskcast.pipeline.frame import Frame
from maskcast.pipeline.sources.live import LiveSource
from maskcast.pipeline.sources.source import SourceLostError
from maskcast.pipeline.sources.state import StateChange

TIMEOUT_S = 25.0
"""Less than the wait after a wrong password; the documented 2 s do not hold on a busy machine."""


class Watched:
    """A live source, read on a thread of its own, with its frames and changes of state."""

    def __init__(self, url: str, **options) -> None:
        self.frames: list[Frame] = []
        self.at_s: list[float] = []
        self.changes: list[StateChange] = []
        self.corrupt = 0
        self.error: BaseException | None = None
        self._config = SourceConfig(url=url, name="cam", **options)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._read, name="watched")

    def _read(self) -> None:
        try:
            with LiveSource(self._config, self.changes.append, self._stopping) as source:
                for frame in source:
                    self.at_s.append(time.monotonic())
                    self.frames.append(frame)
                    self.corrupt = source.corrupt
        except BaseException as error:
            self.error = error

    def __enter__(self) -> "Watched":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join(TIMEOUT_S)
        assert not self._thread.is_alive()

    @property
    def states(self) -> list[str]:
        return [str(change.state) for change in self.changes]

    def wait_for_state(self, state: str, timeout_s: float = TIMEOUT_S) -> StateChange:
        wait_until(lambda: self.states[-1:] == [state], timeout_s)
        return self.changes[-1]

    def wait_for_frames(self, count: int = 10, timeout_s: float = TIMEOUT_S) -> list[Frame]:
        """Wait for this number of further frames; return them."""
        before = len(self.frames)
        wait_until(lambda: len(self.frames) >= before + count, timeout_s)
        return self.frames[before:]

    def assert_in_order(self) -> None:
        assert [frame.index for frame in self.frames] == list(range(len(self.frames)))
        times_s = [frame.pts_s or 0.0 for frame in self.frames]
        assert all(before < after for before, after in pairwise(times_s))


@contextmanager
def watch(url: str, **options) -> Iterator[Watched]:
    with Watched(url, **options) as watched:
        yield watched
    assert watched.error is None or isinstance(watched.error, SourceLostError), watched.error
