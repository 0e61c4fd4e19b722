"""Regions: the zones and lines of one source."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from maskcast.engines.instances.instances import Instances
from maskcast.pipeline.configuration.labels import label_of
from maskcast.pipeline.configuration.zones import LineConfig, Point, ZoneConfig
from maskcast.pipeline.tracking.coverage import Coverage, centres, feet
from maskcast.pipeline.tracking.debounce import Sighting
from maskcast.pipeline.tracking.lines import Crossed, Direction, LineWatch
from maskcast.pipeline.tracking.overlap import binary_crops
from maskcast.pipeline.tracking.zones import FEET_MARGIN, STAY_SHARE, Entered, Left, ZoneWatch

FAR = 4.0
"""Extent of the polygon on one side of a line, in diagonals of the frame, to cover the frame."""

Change = Entered | Left | Crossed


def check_labels(
    regions: Sequence[ZoneConfig | LineConfig], label_names: Sequence[str], source: str
) -> None:
    """Check that the model knows the classes of a source's zones and lines.

    Raises:
        InputError: the model lacks one of the classes.
    """
    for region in regions:
        for name in region.labels or ():
            label_of(name, label_names, f"source {source}: {region.name}")


class RegionEvent(NamedTuple):
    """A track has entered, left or crossed the zone or line named ``region``."""

    track_id: int
    label: int
    region: str
    change: Change


class Regions:
    """The zones and lines of one source.

    Args:
        zones: the source's zones.
        lines: the source's lines.
        label_names: the model's class names, indexed by label.
    """

    def __init__(
        self,
        zones: Sequence[ZoneConfig],
        lines: Sequence[LineConfig],
        label_names: Sequence[str],
    ) -> None:
        self._zone_configs, self._line_configs = zones, lines
        self._wanted = np.array(
            [
                [wanted is None or name in wanted for name in label_names]
                for wanted in (*(zone.labels for zone in zones), *(line.labels for line in lines))
            ]
        )
        self._min_overlap = np.array([zone.min_overlap for zone in zones])
        self._by_feet = np.array([zone.anchor == "feet" for zone in zones], np.bool_)
        self._totals: list[dict[Direction, int]] = [{"forward": 0, "backward": 0} for _ in lines]
        self._labels: dict[int, int] = {}
        self._size = (0, 0)
        self._resize(1, 1)

    def zones(self) -> dict[str, int]:
        """Return the number of tracks in each zone, by its name."""
        return {watch.config.name: watch.count for watch in self._zones}

    def lines(self) -> dict[str, dict[str, int]]:
        """Return the number of crossings of each line, by its name and direction."""
        return {
            config.name: {str(direction): count for direction, count in totals.items()}
            for config, totals in zip(self._line_configs, self._totals, strict=True)
        }

    def update(
        self,
        instances: Instances,
        time_s: float,
        index: int,
        capture_ns: int,
    ) -> list[RegionEvent]:
        """Update the zones and lines with the tracks of a frame; return the changes.

        Args:
            instances: the frame's instances, with track ids.
            time_s: the frame's time, seconds.
            index: the frame's index.
            capture_ns: when the frame was captured, UTC nanoseconds.
        """
        size = (instances.width, instances.height)
        if self._size != size:
            self._resize(*size)
        assert instances.track_ids is not None
        tracked = np.flatnonzero(instances.track_ids > 0)
        if not len(tracked) or not len(self._wanted):
            return []
        labels = instances.labels[tracked]
        boxes = instances.boxes[tracked].astype(np.float64)
        crops = binary_crops(instances)[tracked]
        shares = self._coverage.shares(crops, boxes)
        tracks = list(zip(instances.track_ids[tracked].tolist(), labels.tolist(), strict=True))
        self._labels.update(tracks)
        sightings = [
            Sighting(time_s, index, capture_ns, x, y) for x, y in centres(crops, boxes).tolist()
        ]
        wanted = self._wanted[:, labels]
        events: list[RegionEvent] = []
        enters, stays = self._inside(shares, crops, boxes)
        for k, zone in enumerate(self._zones):
            known = [zone.has_visit(track_id) for track_id, _ in tracks]
            for i in np.flatnonzero(wanted[k] & (stays[:, k] | known)).tolist():
                track_id, label = tracks[i]
                inside = bool((stays if zone.is_inside(track_id) else enters)[i, k])
                events += [
                    RegionEvent(track_id, label, zone.config.name, change)
                    for change in zone.update(track_id, inside, sightings[i])
                ]
        for k, line in enumerate(self._lines, len(self._zones)):
            for i in np.flatnonzero(wanted[k]).tolist():
                track_id, label = tracks[i]
                events += [
                    RegionEvent(track_id, label, line.config.name, change)
                    for change in line.update(track_id, float(shares[i, k]), sightings[i])
                ]
        return events

    def end(self, track_id: int) -> list[RegionEvent]:
        """Delete a track that has ended; return the changes at its end."""
        label = self._labels.pop(track_id, 0)
        regions: list[LineWatch | ZoneWatch] = [*self._lines, *self._zones]
        return [
            RegionEvent(track_id, label, region.config.name, change)
            for region in regions
            for change in region.end(track_id)
        ]

    def _resize(self, width: int, height: int) -> None:
        """Start again for frames of another size; the totals of the lines are kept."""
        self._size = (width, height)
        size = np.array([width, height], np.float64)
        polygons = [np.array(zone.polygon) * size for zone in self._zone_configs]
        polygons += [_ahead(line.points, size) for line in self._line_configs]
        self._coverage = Coverage(polygons)
        self._zones = [ZoneWatch(zone) for zone in self._zone_configs]
        self._lines = [
            LineWatch(line, width, height, totals)
            for line, totals in zip(self._line_configs, self._totals, strict=True)
        ]

    def _inside(
        self, shares: NDArray[np.float64], crops: NDArray[np.uint8], boxes: NDArray[np.float64]
    ) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Tell which tracks are inside far enough to enter each zone, and which to stay in it.

        To stay, a smaller share of the mask is enough; with ``feet``, a point near them.

        Returns:
            Two boolean arrays, ``[N, zones]``.
        """
        shares = shares[:, : len(self._zones)]
        enters, stays = shares >= self._min_overlap, shares >= STAY_SHARE * self._min_overlap
        if self._by_feet.any():
            points = feet(crops, boxes)
            margin = FEET_MARGIN * (boxes[:, 3] - boxes[:, 1])[:, None]
            inside = self._coverage.contains(points)
            near = inside.copy()
            for direction in ((1, 0), (-1, 0), (0, 1), (0, -1)):
                near |= self._coverage.contains(points + margin * direction)
            enters[:, self._by_feet] = inside[:, : len(self._zones)][:, self._by_feet]
            stays[:, self._by_feet] = near[:, : len(self._zones)][:, self._by_feet]
        return enters, stays


def _ahead(points: tuple[Point, Point], size: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the side ahead of a line as a polygon that exceeds the frame: ``[4, 2]`` pixels."""
    begin, end = np.array(points) * size
    along = (end - begin) / np.linalg.norm(end - begin) * np.linalg.norm(size) * FAR
    left = np.array([along[1], -along[0]])  # y increases downwards
    return np.stack([begin - along, end + along, end + along + left, begin - along + left])
