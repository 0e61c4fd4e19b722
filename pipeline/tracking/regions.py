"""Regions: all zones and lines of one source, and its tracks among them."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from maskcast.engines.errors import InputError
from maskcast.engines.instances.instances import Instances
from maskcast.pipeline.configuration.zones import LineConfig, Point, ZoneConfig
from maskcast.pipeline.tracking.coverage import Coverage, centres, feet
from maskcast.pipeline.tracking.lines import Crossed, Direction, LineWatch
from maskcast.pipeline.tracking.overlap import binary_crops
from maskcast.pipeline.tracking.settling import Sight
from maskcast.pipeline.tracking.zones import FEET_MARGIN, STAYS, Entered, Left, ZoneWatch

FAR = 4.0
"""Extent of the side of a line in diagonals of the frame: more than the whole frame."""

Happening = Entered | Left | Crossed


def check_labels(
    regions: Sequence[ZoneConfig | LineConfig], label_names: Sequence[str], source: str
) -> None:
    """Check that the model knows the classes of a source's zones and lines.

    Raises:
        InputError: it does not know one.
    """
    for region in regions:
        for name in region.labels or ():
            if name not in label_names[1:]:
                near = difflib.get_close_matches(name, label_names[1:], n=1)
                known = ", ".join(label_names[1:21])
                advice = f"did you mean {near[0]!r}?" if near else f"it has {known}"
                raise InputError(
                    f"source {source}: {region.name}: the model has no class {name!r}; {advice}"
                )


class Met(NamedTuple):
    """What happened to a track at a zone or line."""

    track_id: int
    label: int
    region: str
    what: Happening


class Regions:
    """The zones and lines of one source.

    Args:
        zones: of the source.
        lines: of the source.
        label_names: the model's, indexed by label.
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
        self._least = np.array([zone.min_overlap for zone in zones])
        self._by_feet = np.array([zone.anchor == "feet" for zone in zones], np.bool_)
        self._totals: list[dict[Direction, int]] = [{"forward": 0, "backward": 0} for _ in lines]
        self._labels: dict[int, int] = {}
        self._size = (0, 0)
        self._resize(1, 1)

    def zones(self) -> dict[str, int]:
        """Return how many tracks are in each zone, by its name."""
        return {watch.config.name: watch.count for watch in self._zones}

    def lines(self) -> dict[str, dict[str, int]]:
        """Return how often each line was crossed, by its name, then direction."""
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
    ) -> list[Met]:
        """See the tracks of a frame; return what happened to them.

        Args:
            instances: what was seen, with track ids.
            time_s: the frame's time.
            index: the frame's.
            capture_ns: the frame's.
        """
        size = (instances.width, instances.height)
        if self._size != size:
            self._resize(*size)
        assert instances.track_ids is not None
        shown = np.flatnonzero(instances.track_ids > 0)
        if not len(shown) or not len(self._wanted):
            return []
        labels = instances.labels[shown]
        boxes = instances.boxes[shown].astype(np.float64)
        crops = binary_crops(instances)[shown]
        shares = self._coverage.shares(crops, boxes)
        tracks = list(zip(instances.track_ids[shown].tolist(), labels.tolist(), strict=True))
        self._labels.update(tracks)
        sights = [Sight(time_s, index, capture_ns, x, y) for x, y in centres(crops, boxes).tolist()]
        wanted = self._wanted[:, labels]
        met: list[Met] = []
        enters, stays = self._inside(shares, crops, boxes)
        for k, zone in enumerate(self._zones):
            known = [zone.knows(track_id) for track_id, _ in tracks]
            for i in np.flatnonzero(wanted[k] & (stays[:, k] | known)).tolist():
                track_id, label = tracks[i]
                inside = bool((stays if zone.is_inside(track_id) else enters)[i, k])
                met += [
                    Met(track_id, label, zone.config.name, what)
                    for what in zone.see(track_id, inside, sights[i])
                ]
        for k, line in enumerate(self._lines, len(self._zones)):
            for i in np.flatnonzero(wanted[k]).tolist():
                track_id, label = tracks[i]
                met += [
                    Met(track_id, label, line.config.name, what)
                    for what in line.see(track_id, float(shares[i, k]), sights[i])
                ]
        return met

    def end(self, track_id: int) -> list[Met]:
        """Forget a track that has ended; return what happened at its end."""
        label = self._labels.pop(track_id, 0)
        met: list[Met] = []
        for line in self._lines:
            met += [Met(track_id, label, line.config.name, what) for what in line.end(track_id)]
        for zone in self._zones:
            met += [Met(track_id, label, zone.config.name, what) for what in zone.end(track_id)]
        return met

    def _resize(self, width: int, height: int) -> None:
        """Start again with frames of another size; the totals of lines continue."""
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
        """Tell which tracks enter, and which stay in, each zone.

        To stay, a track may be partly outside; with ``feet``, a point near them may be inside.

        Returns:
            Two arrays ``[N, zones]``.
        """
        shares = shares[:, : len(self._zones)]
        enters, stays = shares >= self._least, shares >= STAYS * self._least
        if self._by_feet.any():
            points = feet(crops, boxes)
            margin = FEET_MARGIN * (boxes[:, 3] - boxes[:, 1])[:, None]
            on = self._coverage.hold(points)
            near = on.copy()
            for way in ((1, 0), (-1, 0), (0, 1), (0, -1)):
                near |= self._coverage.hold(points + margin * way)
            enters[:, self._by_feet] = on[:, : len(self._zones)][:, self._by_feet]
            stays[:, self._by_feet] = near[:, : len(self._zones)][:, self._by_feet]
        return enters, stays


def _ahead(points: tuple[Point, Point], size: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the side of a line that is ahead, as a polygon beyond the frame: ``[4, 2]`` pixels."""
    begin, end = np.array(points) * size
    way = (end - begin) / np.linalg.norm(end - begin) * np.linalg.norm(size) * FAR
    left = np.array([way[1], -way[0]])  # on screen, where y goes down
    return np.stack([begin - way, end + way, end + way + left, begin - way + left])
