"""SourceAnalysis: tracks, zones and lines of one source."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from maskcast.engines.instances.instances import Instances
from maskcast.pipeline.configuration.config import SourceConfig
from maskcast.pipeline.frame import Frame
from maskcast.pipeline.tracking.lines import Crossed
from maskcast.pipeline.tracking.regions import Met, Regions
from maskcast.pipeline.tracking.tracker import EndedTrack, EndReason, Tracker
from maskcast.pipeline.tracking.zones import Entered, Left


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
        config: the source, with the zones and lines themselves; None where nothing is tracked.
    """

    zones: Mapping[str, int] = field(default_factory=dict)
    lines: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    events: tuple[TrackEvent, ...] = ()
    config: SourceConfig | None = None


UNTRACKED = Analysis()
"""For a source that is not tracked."""


class SourceAnalysis:
    """Follows the objects of one source.

    Args:
        config: the source.
        label_names: the model's, indexed by label.
        min_score: below which nothing is reported.
    """

    def __init__(self, config: SourceConfig, label_names: Sequence[str], min_score: float) -> None:
        self._config = config
        self._label_names = label_names
        self._tracker = Tracker(min_score)
        self._regions = Regions(config.zones, config.lines, label_names)
        self._last: Frame | None = None

    def update(self, frame: Frame, instances: Instances) -> tuple[Instances, Analysis]:
        """Give a frame's instances their track ids; return what happened to the tracks."""
        time_s = time_of(frame)
        update = self._tracker.update(instances, time_s)
        self._last = frame
        events = [event for track in update.ended for event in self._end(track, frame)]
        tracked = replace(instances, track_ids=update.track_ids)
        if self._config.zones or self._config.lines:
            events += [
                self._met(met)
                for met in self._regions.update(tracked, time_s, frame.index, frame.capture_ns)
            ]
        analysis = Analysis(
            self._regions.zones(), self._regions.lines(), tuple(events), self._config
        )
        return tracked, analysis

    def end(self, reason: EndReason) -> tuple[TrackEvent, ...]:
        """End all tracks; return the events of their ends."""
        if self._last is None:
            return ()
        ended = self._tracker.end(reason)
        return tuple(event for track in ended for event in self._end(track, self._last))

    def _end(self, track: EndedTrack, frame: Frame) -> list[TrackEvent]:
        """Return the events of a track's end: it leaves its zones before."""
        before = [self._met(met) for met in self._regions.end(track.track_id)]
        data = self._data(track.track_id, track.label, frame.index, frame.capture_ns)
        data |= {"duration_s": round(track.last_s - track.first_s, 3), "reason": track.reason}
        return [*before, TrackEvent("track_ended", data)]

    def _met(self, met: Met) -> TrackEvent:
        sight = met.what.sight
        data = self._data(met.track_id, met.label, sight.index, sight.capture_ns)
        match met.what:
            case Entered():
                return TrackEvent("zone_entered", data | {"zone": met.region})
            case Left(_, dwell_s):
                data |= {"zone": met.region, "dwell_s": round(dwell_s, 3)}
                return TrackEvent("zone_left", data)
            case Crossed(_, direction):
                return TrackEvent(
                    "line_crossed", data | {"line": met.region, "direction": direction}
                )

    def _data(self, track_id: int, label: int, index: int, capture_ns: int) -> dict[str, Any]:
        return {
            "track_id": track_id,
            "label": self._label_names[label],
            "index": index,
            "capture_ns": capture_ns,
        }


def time_of(frame: Frame) -> float:
    """Return when a frame was captured, in seconds of the clock that is steadiest."""
    return frame.pts_s if frame.pts_s is not None else frame.capture_ns / 1e9
