"""FrameRateLimiter: which pictures of a source are wanted at all."""

from __future__ import annotations

from typing import Protocol

from maskcast.pipeline.config import SourceConfig


class FrameRateLimiter(Protocol):
    """Decides for every picture in turn whether it goes on.

    Attributes:
        reason: what a picture that does not is counted under.
    """

    reason: str

    def keeps(self, time_s: float) -> bool:
        """Tell whether the next picture goes on; ``time_s`` is when it was captured, seconds."""


def thinnings(config: SourceConfig) -> list[FrameRateLimiter]:
    """Return what a source asks for, in the order that its pictures pass them."""
    asked: list[FrameRateLimiter] = []
    if config.every_nth > 1:
        asked.append(EveryNth(config.every_nth))
    if config.max_fps is not None:
        asked.append(MaxFps(config.max_fps))
    return asked


class EveryNth:
    """Keeps the first picture of every ``n``."""

    reason = "every_nth"

    def __init__(self, n: int) -> None:
        self._n = n
        self._index = -1

    def keeps(self, time_s: float) -> bool:
        """Tell whether the next picture goes on."""
        self._index += 1
        return self._index % self._n == 0


class MaxFps:
    """Keeps no more than ``fps`` pictures per second, as evenly as they come.

    A picture may come a tenth of an interval early, or a camera that jitters would lose every other
    picture at its own rate; the average is held all the same.
    """

    reason = "max_fps"

    def __init__(self, fps: float) -> None:
        self._interval_s = 1.0 / fps
        self._due_s: float | None = None

    def keeps(self, time_s: float) -> bool:
        """Tell whether the next picture goes on."""
        interval_s = self._interval_s
        due_s = self._due_s
        if due_s is None or time_s > due_s + interval_s or time_s < due_s - 2 * interval_s:
            due_s = time_s  # the first picture, the first after a gap, or a clock that went back
        if time_s < due_s - interval_s / 10:
            return False
        self._due_s = due_s + interval_s
        return True
