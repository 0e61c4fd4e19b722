"""SourceAnalysis: what becomes of the objects of one source, frame after frame."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from maskcast.engines.instances import Instances
from maskcast.pipeline.config import SourceConfig
from maskcast.pipeline.frame import Frame
from maskcast.pipeline.tracking.tracker import EndedTrack, EndReason, Tracker


class TrackEvent(NamedTuple):
    """Something that happened to a track; docs/wire.md lists names and data."""

    name: str
    data: Mapping[str, str | int | float]


@dataclass(frozen=True, slots=True)
class Analysis:
    """What is known of the objects of a source after a frame.

    Attributes:
        zones: instances in each zone, by the zone's name.
        lines: crossings of each line since the start, by its name, then "forward" or "backward".
        events: what happened in this frame.
    """

    zones: Mapping[str, int] = field(default_factory=dict)
    lines: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    events: tuple[TrackEvent, ...] = ()


UNTRACKED = Analysis()
"""Of a source whose objects are not followed."""


class SourceAnalysis:
    """Follows the objects of one source.

    Args:
        config: the source.
        label_names: the model's, indexed by label.
        min_score: below which nothing is reported.
    """

    def __init__(self, config: SourceConfig, label_names: Sequence[str], min_score: float) -> None:
        del config
        self._label_names = label_names
        self._tracker = Tracker(min_score)
        self._last: Frame | None = None

    def update(self, frame: Frame, instances: Instances) -> tuple[Instances, Analysis]:
        """Give a frame's instances their track ids; return what happened to the tracks."""
        update = self._tracker.update(instances, time_of(frame))
        self._last = frame
        events = tuple(self._track_ended(track, frame) for track in update.ended)
        return replace(instances, track_ids=update.track_ids), Analysis(events=events)

    def end(self, reason: EndReason) -> tuple[TrackEvent, ...]:
        """End all tracks; return the events of their ends."""
        if self._last is None:
            return ()
        return tuple(self._track_ended(track, self._last) for track in self._tracker.end(reason))

    def _track_ended(self, track: EndedTrack, frame: Frame) -> TrackEvent:
        data: dict[str, Any] = {
            "track_id": track.track_id,
            "label": self._label_names[track.label],
            "index": frame.index,
            "capture_ns": frame.capture_ns,
            "duration_s": round(track.last_s - track.first_s, 3),
            "reason": track.reason,
        }
        return TrackEvent("track_ended", data)


def time_of(frame: Frame) -> float:
    """Return when a frame was captured, in seconds of the clock that is steadiest."""
    return frame.pts_s if frame.pts_s is not None else frame.capture_ns / 1e9
