"""Zones: which tracks are in a polygon, and since when."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from maskcast.pipeline.configuration.zones import ZoneConfig
from maskcast.pipeline.tracking.settling import Settling, Sight

STAYS = 0.7
"""A track stays in a zone while its overlap is at least this share of ``min_overlap``."""

FEET_MARGIN = 0.05
"""With ``feet``: it stays while they are at most this share of its height outside."""


@dataclass(slots=True)
class _Visit:
    """A track and a zone."""

    inside: Settling = field(default_factory=Settling)
    entered: Sight | None = None


class Entered(NamedTuple):
    """A track has entered a zone, at ``sight``."""

    sight: Sight


class Left(NamedTuple):
    """A track has left a zone, at ``sight``, after ``dwell_s`` seconds there."""

    sight: Sight
    dwell_s: float


class ZoneWatch:
    """Follows the tracks of one source through one zone.

    Args:
        config: the zone.
    """

    def __init__(self, config: ZoneConfig) -> None:
        self.config = config
        self._visits: dict[int, _Visit] = {}

    @property
    def count(self) -> int:
        """Number of tracks in the zone now; a track that is hidden for a moment counts."""
        return sum(visit.inside.value is True for visit in self._visits.values())

    def knows(self, track_id: int) -> bool:
        """Tell whether a track is, or was for a moment, in the zone."""
        return track_id in self._visits

    def is_inside(self, track_id: int) -> bool:
        """Tell whether a track is in the zone."""
        visit = self._visits.get(track_id)
        return visit is not None and visit.inside.value is True

    def see(self, track_id: int, inside: bool, sight: Sight) -> list[Entered | Left]:
        """Note whether a track is inside in a frame, hysteresis included; return what happened."""
        visit = self._visits.get(track_id)
        if visit is None:
            if not inside:
                return []
            visit = self._visits[track_id] = _Visit()
            visit.inside.settle(False, sight)
        first = visit.inside.since or sight
        if not visit.inside.see(inside, sight):
            return []
        visit.inside.settle(inside, sight)
        if inside:
            visit.entered = first
            return [Entered(first)]
        entered, visit.entered = visit.entered, None
        del self._visits[track_id]
        return [Left(first, first.time_s - entered.time_s)] if entered else []

    def end(self, track_id: int) -> list[Entered | Left]:
        """Forget a track; return what happened at its end."""
        visit = self._visits.pop(track_id, None)
        if visit is None or visit.entered is None:
            return []
        assert visit.inside.last is not None
        last = visit.inside.since or visit.inside.last
        return [Left(last, last.time_s - visit.entered.time_s)]
