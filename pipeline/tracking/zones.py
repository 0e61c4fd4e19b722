"""Zones: which tracks are in a polygon, and since when."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from maskcast.pipeline.configuration.zones import ZoneConfig
from maskcast.pipeline.tracking.debounce import Debounce, Sighting

STAY_SHARE = 0.7
"""A track stays in a zone while its overlap is at least this share of ``min_overlap``."""

FEET_MARGIN = 0.05
"""With ``feet``, a track stays while they are outside by at most this share of its height."""


@dataclass(slots=True)
class _Visit:
    """The state of a track in a zone; ``entered`` is None until it has entered."""

    inside: Debounce = field(default_factory=Debounce)
    entered: Sighting | None = None


class Entered(NamedTuple):
    """A track has entered a zone; ``sighting`` is the first one inside."""

    sighting: Sighting


class Left(NamedTuple):
    """A track has left a zone after ``dwell_s`` seconds; ``sighting`` is the first one outside.

    If the track has ended inside, ``sighting`` is its last one.
    """

    sighting: Sighting
    dwell_s: float


class ZoneWatch:
    """Detects when the tracks of one source enter and leave a zone.

    Args:
        config: the zone.
    """

    def __init__(self, config: ZoneConfig) -> None:
        self.config = config
        self._visits: dict[int, _Visit] = {}

    @property
    def count(self) -> int:
        """Number of tracks in the zone, including tracks that are hidden for a moment."""
        return sum(visit.inside.value is True for visit in self._visits.values())

    def has_visit(self, track_id: int) -> bool:
        """Tell whether a track is in the zone, or was in it too briefly to be counted."""
        return track_id in self._visits

    def is_inside(self, track_id: int) -> bool:
        """Tell whether a track is in the zone."""
        visit = self._visits.get(track_id)
        return visit is not None and visit.inside.value is True

    def update(self, track_id: int, inside: bool, sighting: Sighting) -> list[Entered | Left]:
        """Note whether a track is inside in a frame; return whether it has entered or left."""
        visit = self._visits.get(track_id)
        if visit is None:
            if not inside:
                return []
            visit = self._visits[track_id] = _Visit()
            visit.inside.accept(False, sighting)
        first = visit.inside.since or sighting
        if not visit.inside.update(inside, sighting):
            return []
        visit.inside.accept(inside, sighting)
        if inside:
            visit.entered = first
            return [Entered(first)]
        entered, visit.entered = visit.entered, None
        del self._visits[track_id]
        return [Left(first, first.time_s - entered.time_s)] if entered else []

    def end(self, track_id: int) -> list[Entered | Left]:
        """Delete a track that has ended; if it was inside, return that it has left."""
        visit = self._visits.pop(track_id, None)
        if visit is None or visit.entered is None:
            return []
        assert visit.inside.last is not None
        last = visit.inside.since or visit.inside.last
        return [Left(last, last.time_s - visit.entered.time_s)]
