"""Settling: a value that counts only once it has lasted."""

from __future__ import annotations

from dataclasses import dataclass

HOLD_S = 0.2
"""A new value counts when it has lasted this long."""


@dataclass(frozen=True, slots=True)
class Sight:
    """When and where a track was seen: time in seconds, frame index, UTC nanoseconds, pixels."""

    time_s: float
    index: int
    capture_ns: int
    x: float
    y: float


@dataclass(slots=True)
class Settling:
    """A boolean property of one track, such as whether it is in a zone.

    A mask that flickers at an edge changes it to and fro from frame to frame. A change counts when
    all frames agree up to one that is at least ``HOLD_S`` later.

    Attributes:
        value: what counts; None while nothing has.
        last: the last sight that agreed with ``value``.
        since: the first sight of another value, None while there is none.
    """

    value: bool | None = None
    last: Sight | None = None
    since: Sight | None = None
    _times: int = 0

    def see(self, value: bool, sight: Sight) -> bool:
        """Note a value; tell whether it has just come to count (``since`` is its first sight)."""
        if value == self.value:
            self.last, self.since, self._times = sight, None, 0
            return False
        self.since = self.since or sight
        self._times += 1
        return sight.time_s >= self.since.time_s + HOLD_S

    def end(self) -> bool:
        """Tell whether a new value would have come to count, now that no more follows."""
        return self._times >= 2

    def settle(self, value: bool, sight: Sight) -> None:
        """Let a value count, seen last at ``sight``."""
        self.value, self.last, self.since, self._times = value, sight, None, 0
