"""Lines: which tracks have crossed a line, and in which direction."""

from __future__ import annotations

from typing import Literal, NamedTuple

from maskcast.pipeline.configuration.zones import LineConfig
from maskcast.pipeline.tracking.settling import Settling, Sight

ACROSS = 0.6
"""An object is on a side when this share of its mask is."""

Direction = Literal["forward", "backward"]


class Crossed(NamedTuple):
    """A track has crossed a line, at ``sight``."""

    sight: Sight
    direction: Direction


class LineWatch:
    """Follows the tracks of one source across one line.

    Args:
        config: the line.
        width: the frame's, pixels.
        height: likewise.
        totals: crossings so far; continued and changed.
    """

    def __init__(
        self, config: LineConfig, width: int, height: int, totals: dict[Direction, int]
    ) -> None:
        self.config = config
        self.totals = totals
        (x0, y0), (x1, y1) = config.points
        self._begin, self._end = (x0 * width, y0 * height), (x1 * width, y1 * height)
        self._sides: dict[int, Settling] = {}

    def see(self, track_id: int, ahead: float, sight: Sight) -> list[Crossed]:
        """Note what share of a track's mask is ahead of the line; return what happened.

        An object that passes an end of the line has not crossed it: its centre must move between
        both ends, from where it was last on one side to where it was first on the other.
        """
        side = self._sides.setdefault(track_id, Settling())
        if 1 - ACROSS < ahead < ACROSS:
            return []
        is_ahead = ahead >= ACROSS
        if side.value is None:
            side.settle(is_ahead, sight)
            return []
        if not side.see(is_ahead, sight):
            return []
        return self._cross(side, is_ahead, sight)

    def end(self, track_id: int) -> list[Crossed]:
        """Forget a track; return what happened at its end."""
        side = self._sides.pop(track_id, None)
        if side is None or side.value is None or side.since is None or not side.end():
            return []
        return self._cross(side, not side.value, side.since)

    def _cross(self, side: Settling, is_ahead: bool, sight: Sight) -> list[Crossed]:
        last, first = side.last, side.since
        assert last is not None
        assert first is not None
        side.settle(is_ahead, sight)
        direction: Direction = "forward" if is_ahead else "backward"
        if self.config.direction not in ("both", direction) or not self._passes(last, first):
            return []
        self.totals[direction] += 1
        return [Crossed(first, direction)]

    def _passes(self, last: Sight, first: Sight) -> bool:
        """Tell whether the path from one sight to the other passes between the line's ends."""
        (x0, y0), (x1, y1) = self._begin, self._end
        way_x, way_y = first.x - last.x, first.y - last.y
        begins = way_x * (y0 - last.y) - way_y * (x0 - last.x)
        ends = way_x * (y1 - last.y) - way_y * (x1 - last.x)
        return begins * ends <= 0
