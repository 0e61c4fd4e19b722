"""Debounce: a boolean that changes only after a new value has lasted."""

from __future__ import annotations

from dataclasses import dataclass

HOLD_S = 0.2
"""A new value is accepted when it has lasted this long."""


@dataclass(frozen=True, slots=True)
class Sighting:
    """When and where a track was detected.

    Attributes:
        time_s: time of the frame, seconds.
        index: index of the frame.
        capture_ns: when the frame was captured, UTC nanoseconds.
        x, y: centre of the mask, pixels.
    """

    time_s: float
    index: int
    capture_ns: int
    x: float
    y: float


@dataclass(slots=True)
class Debounce:
    """A boolean property of one track, such as whether it is in a zone.

    A mask that flickers at an edge changes it back and forth from frame to frame. A new value is
    accepted when all frames for at least ``HOLD_S`` agree on it.

    Attributes:
        value: the accepted value; None before the first.
        last: the last sighting that agreed with ``value``.
        since: the first sighting of another value; None while there is none.
    """

    value: bool | None = None
    last: Sighting | None = None
    since: Sighting | None = None
    _count: int = 0

    def update(self, value: bool, sighting: Sighting) -> bool:
        """Note a value; return whether it is now to be accepted with ``accept``.

        ``since`` is then its first sighting.
        """
        if value == self.value:
            self.last, self.since, self._count = sighting, None, 0
            return False
        self.since = self.since or sighting
        self._count += 1
        return sighting.time_s >= self.since.time_s + HOLD_S

    def end(self) -> bool:
        """Return whether a new value is to be accepted because the track has ended."""
        return self._count >= 2

    def accept(self, value: bool, sighting: Sighting) -> None:
        """Accept a value, last seen at ``sighting``."""
        self.value, self.last, self.since, self._count = value, sighting, None, 0
