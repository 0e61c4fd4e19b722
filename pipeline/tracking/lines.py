"""Lines: which tracks have crossed a line, and in which direction."""

from __future__ import annotations

from typing import Literal, NamedTuple

from maskcast.pipeline.configuration.zones import LineConfig
from maskcast.pipeline.tracking.debounce import Debounce, Sighting

ACROSS = 0.6
"""An object is on one side of a line when this share of its mask is."""

Direction = Literal["forward", "backward"]


class Crossed(NamedTuple):
    """A track has crossed a line; ``sighting`` is the first one on the other side."""

    sighting: Sighting
    direction: Direction


class LineWatch:
    """Detects when the tracks of one source cross a line.

    Args:
        config: the line.
        width: width of the frame, pixels.
        height: height of the frame, pixels.
        totals: number of crossings so far; updated in place.
    """

    def __init__(
        self, config: LineConfig, width: int, height: int, totals: dict[Direction, int]
    ) -> None:
        self.config = config
        self.totals = totals
        (x0, y0), (x1, y1) = config.points
        self._begin, self._end = (x0 * width, y0 * height), (x1 * width, y1 * height)
        self._sides: dict[int, Debounce] = {}

    def update(self, track_id: int, ahead: float, sighting: Sighting) -> list[Crossed]:
        """Note the share of a track's mask that is ahead of the line; return the crossing, if any.

        An object that passes an end of the line has not crossed it: the path from its last centre
        on one side to its first centre on the other side must pass between both ends.
        """
        side = self._sides.setdefault(track_id, Debounce())
        if 1 - ACROSS < ahead < ACROSS:
            return []
        is_ahead = ahead >= ACROSS
        if side.value is None:
            side.accept(is_ahead, sighting)
            return []
        if not side.update(is_ahead, sighting):
            return []
        return self._cross(side, is_ahead, sighting)

    def end(self, track_id: int) -> list[Crossed]:
        """Delete a track that has ended; return the crossing at its end, if any."""
        side = self._sides.pop(track_id, None)
        if side is None or side.value is None or side.since is None or not side.end():
            return []
        return self._cross(side, not side.value, side.since)

    def _cross(self, side: Debounce, is_ahead: bool, sighting: Sighting) -> list[Crossed]:
        last, first = side.last, side.since
        assert last is not None
        assert first is not None
        side.accept(is_ahead, sighting)
        direction: Direction = "forward" if is_ahead else "backward"
        if self.config.direction not in ("both", direction) or not self._passes(last, first):
            return []
        self.totals[direction] += 1
        return [Crossed(first, direction)]

    def _passes(self, last: Sighting, first: Sighting) -> bool:
        """Tell whether the path from one sighting to the other passes between the line's ends."""
        (x0, y0), (x1, y1) = self._begin, self._end
        path_x, path_y = first.x - last.x, first.y - last.y
        begin_side = path_x * (y0 - last.y) - path_y * (x0 - last.x)
        end_side = path_x * (y1 - last.y) - path_y * (x1 - last.x)
        return begin_side * end_side <= 0
