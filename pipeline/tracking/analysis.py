"""SourceAnalysis: tracks, zones and lines of one source."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from maskcast.engines.instances.instances import Instances
from maskcast.pipeline.configuration.config import SourceConfig
from maskcast.pipeline.frame import Frame
from maskcast.pipeline.tracking.lines import Crossed
from maskcast.pipeline.tracking.regions import RegionEvent, Regions
from maskcast.pipeline.tracking.tracker import EndedTrack, EndReason, Tracker
from maskcast.pipeline.tracking.zones import Entered, Left


class TrackEvent(NamedTuple):
    """An event of a track; docs/wire.md lists the names and the data."""

    name: str
    data: Mapping[str, str | int | float]


@dataclass(frozen=True, slots=True)
class Analysis:
    """The tracks, zones and lines of a source after a frame.

    Attributes:
        zones: number of tracks in each zone, by the zone's name.
        lines: crossings of each line since the start, by its name and "forward" or "backward".
        events: the events of this frame.
        config: the source's configuration, with its zones and lines; None if it is not tracked.
    """

    zones: Mapping[str, int] = field(default_factory=dict)
    lines: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    events: tuple[TrackEvent, ...] = ()
    config: SourceConfig | None = None


UNTRACKED = Analysis()
"""The analysis of every frame of a source that is not tracked."""


class SourceAnalysis:
    """Tracks the objects of one source, through its zones and across its lines.

    Args:
        config: the source.
        label_names: the model's class names, indexed by label.
        min_score: minimum score of the instances, 0..1.
    """

    def __init__(self, config: SourceConfig, label_names: Sequence[str], min_score: float) -> None:
        self._config = config
        self._label_names = label_names
        self._tracker = Tracker(min_score)
        self._regions = Regions(config.zones, config.lines, label_names)
        self._last: Frame | None = None

    def update(self, frame: Frame, instances: Instances) -> tuple[Instances, Analysis]:
        """Return a frame's instances with track ids, and the analysis after this frame."""
        time_s = time_of(frame)
        update = self._tracker.update(instances, time_s)
        self._last = frame
        events = [event for track in update.ended for event in self._end(track, frame)]
        tracked = replace(instances, track_ids=update.track_ids)
        if self._config.zones or self._config.lines:
            events += [
                self._track_event(event)
                for event in self._regions.update(tracked, time_s, frame.index, frame.capture_ns)
            ]
        analysis = Analysis(
            self._regions.zones(), self._regions.lines(), tuple(events), self._config
        )
        return tracked, analysis

    def end(self, reason: EndReason) -> tuple[TrackEvent, ...]:
        """End all tracks; return their last events."""
        if self._last is None:
            return ()
        ended = self._tracker.end(reason)
        return tuple(event for track in ended for event in self._end(track, self._last))

    def _end(self, track: EndedTrack, frame: Frame) -> list[TrackEvent]:
        """Return the last events of a track: it leaves its zones, then it ends."""
        before = [self._track_event(event) for event in self._regions.end(track.track_id)]
        data = self._data(track.track_id, track.label, frame.index, frame.capture_ns)
        data |= {"duration_s": round(track.last_s - track.first_s, 3), "reason": track.reason}
        return [*before, TrackEvent("track_ended", data)]

    def _track_event(self, event: RegionEvent) -> TrackEvent:
        sighting, region = event.change.sighting, event.region
        data = self._data(event.track_id, event.label, sighting.index, sighting.capture_ns)
        match event.change:
            case Entered():
                return TrackEvent("zone_entered", data | {"zone": region})
            case Left(_, dwell_s):
                return TrackEvent(
                    "zone_left", data | {"zone": region, "dwell_s": round(dwell_s, 3)}
                )
            case Crossed(_, direction):
                return TrackEvent("line_crossed", data | {"line": region, "direction": direction})

    def _data(self, track_id: int, label: int, index: int, capture_ns: int) -> dict[str, Any]:
        return {
            "track_id": track_id,
            "label": self._label_names[label],
            "index": index,
            "capture_ns": capture_ns,
        }


def time_of(frame: Frame) -> float:
    """Return a frame's time in seconds, preferably on the stream's own clock, which is steadier."""
    return frame.pts_s if frame.pts_s is not None else frame.capture_ns / 1e9
