"""Frame rate limiters: choose which frames of a source are processed."""

from __future__ import annotations

from typing import Protocol

from maskcast.pipeline.configuration.config import SourceConfig


class FrameRateLimiter(Protocol):
    """Decides for every frame in turn whether it is processed.

    Attributes:
        reason: the reason under which skipped frames are counted.
    """

    reason: str

    def keeps(self, time_s: float) -> bool:
        """Tell whether the next frame, at ``time_s`` in seconds, is processed."""


def frame_rate_limiters(config: SourceConfig) -> list[FrameRateLimiter]:
    """Return the configured limiters of a source, in the order of their use."""
    limiters: list[FrameRateLimiter] = []
    if config.every_nth > 1:
        limiters.append(EveryNth(config.every_nth))
    if config.max_fps is not None:
        limiters.append(MaxFps(config.max_fps))
    return limiters


class EveryNth:
    """Keeps the first of every ``n`` frames."""

    reason = "every_nth"

    def __init__(self, n: int) -> None:
        self._n = n
        self._index = -1

    def keeps(self, time_s: float) -> bool:
        """Tell whether the next frame is processed."""
        self._index += 1
        return self._index % self._n == 0


class MaxFps:
    """Keeps at most ``fps`` frames per second on average, evenly spaced.

    A frame may be early by a tenth of an interval. Otherwise a camera with jitter that is limited
    to its own rate would lose every other frame.
    """

    reason = "max_fps"

    def __init__(self, fps: float) -> None:
        self._interval_s = 1.0 / fps
        self._due_s: float | None = None

    def keeps(self, time_s: float) -> bool:
        """Tell whether the next frame is processed."""
        interval_s = self._interval_s
        due_s = self._due_s
        if due_s is None or time_s > due_s + interval_s or time_s < due_s - 2 * interval_s:
            due_s = time_s  # the first frame, the first after a gap, or after a step back in time
        if time_s < due_s - interval_s / 10:
            return False
        self._due_s = due_s + interval_s
        return True
