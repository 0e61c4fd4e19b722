"""Tracker: gives the instances of one source's frames the ids of the objects that they are."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from maskcast.engines.instances.instances import Instances
from maskcast.pipeline.tracking.assignment import best_pairs
from maskcast.pipeline.tracking.motion import MOST_DEVIATIONS, Box, Motion, Size, Step
from maskcast.pipeline.tracking.overlap import binary_crops, mask_iou

LOST_AFTER_S = 2.0
"""A track that no instance has continued for longer has ended."""

TENTATIVE_S = 0.5
"""Likewise of a track without an id."""

LEAST_FRAMES = 2.5
"""No track ends sooner than after this many frames at the rate at which they come."""

NAMED_AFTER_S = (0.08, 0.25)
"""A track gets its id when it has been seen three times over this long, or twice over the longer
time: before, it may be a false alarm, or a part of an object that has a track of its own."""

SURE_SHARE = 0.25
"""Scores in the lowest quarter of those reported are unsure: they are associated in a second round,
with the tracks that are left."""

LEAST_SIMILARITY = 0.15
"""Of instance and track; 1 is where prediction and mask agree exactly."""

MOST_TRACKS = 400
"""Those unseen for longest end beyond it. A frame has at most 100 instances."""

TIME_JUMP_S = 10.0
"""A clock that jumps by more belongs to another scene: a clip that starts again."""

EndReason = Literal["lost", "size", "time", "ended"]


class EndedTrack(NamedTuple):
    """A track that had an id and has ended.

    Attributes:
        track_id: its id, which is not given again.
        label: its label.
        first_s, last_s: times of the first and the last frame that showed it.
        reason: why it ended.
    """

    track_id: int
    label: int
    first_s: float
    last_s: float
    reason: EndReason


class Update(NamedTuple):
    """What the tracker made of a frame.

    Attributes:
        track_ids: ``[N]`` int32, of each instance; 0 for none yet.
        ended: the tracks that ended.
    """

    track_ids: NDArray[np.int32]
    ended: tuple[EndedTrack, ...]


@dataclass(slots=True, eq=False)
class _Track:
    """An object.

    Attributes:
        label: its label.
        first_s, last_s: times of the first and the last frame that showed it.
        motion: where it is.
        crop: its last mask, ``[28, 28]`` uint8, 0 or 1; all 1 without masks.
        shown: the box of its last instance.
        shown_at: where its centre was believed to be then, x and y.
        track_id: 0 for none yet.
        seen: instances so far.
    """

    label: int
    first_s: float
    last_s: float
    motion: Motion
    crop: NDArray[np.uint8]
    shown: Box
    shown_at: tuple[float, float]
    track_id: int = 0
    seen: int = 1

    def moved(self) -> Box:
        """Return the last box where the object's motion has carried it."""
        x, y = (self.motion.state[k] - self.shown_at[k] for k in (0, 1))
        x1, y1, x2, y2 = self.shown
        return x1 + x, y1 + y, x2 + x, y2 + y


class _Seen(NamedTuple):
    """An instance of the frame; attributes as those of a track."""

    box: Box
    label: int
    is_sure: bool
    crop: NDArray[np.uint8]


class Tracker:
    """Follows the objects of one source.

    Instances are associated with tracks by the overlap of their masks with the masks that the
    tracks had last, at the places where their motion would have carried them by the time of this
    frame, and by how likely those places are; sure instances first, then the unsure with the
    tracks that are left (as ByteTrack does, Zhang et al. 2022). An instance and a track of
    different labels are never associated.

    Args:
        min_score: below which nothing is reported.
    """

    def __init__(self, min_score: float) -> None:
        self._sure = min_score + SURE_SHARE * (1 - min_score)
        self._next_id = 1
        self._size: Size | None = None
        self._time_s = 0.0
        self._interval_s = 0.0  # between frames, lately
        self._tracks: list[_Track] = []

    def __len__(self) -> int:
        return len(self._tracks)

    def update(self, instances: Instances, time_s: float) -> Update:
        """Associate a frame's instances with the tracks.

        Args:
            instances: what was seen in the frame.
            time_s: when it was captured, seconds of any clock that rises.
        """
        ended: list[EndedTrack] = []
        size = (instances.width, instances.height)
        if self._size not in (None, size):
            ended += self.end("size")
        elif not self._time_s <= time_s <= self._time_s + TIME_JUMP_S and self._tracks:
            ended += self.end("time")
        passed_s = time_s - self._time_s if self._tracks else 0.0
        if passed_s > 0:
            known_s = self._interval_s or passed_s
            self._interval_s = known_s + 0.2 * (passed_s - known_s)
        self._size, self._time_s = size, time_s
        if self._tracks:
            step = Step.of(passed_s)
            for track in self._tracks:
                track.motion.predict(step)
        ended += self._end_lost()
        seen = _seen(instances, self._sure)
        of_instance = [
            self._begin(one) if track is None else self._continue(track, one, size)
            for track, one in zip(self._associate(seen, size), seen, strict=True)
        ]
        for track in of_instance:
            self._name(track)
        track_ids = np.array([track.track_id for track in of_instance], np.int32)
        return Update(track_ids, tuple(ended))

    def end(self, reason: EndReason) -> list[EndedTrack]:
        """End all tracks; ids go on."""
        ended, self._tracks = _ended(self._tracks, reason), []
        return ended

    def _associate(self, seen: Sequence[_Seen], size: Size) -> list[_Track | None]:
        """Return the track of each instance, None where it has none."""
        found: list[_Track | None] = [None] * len(seen)
        unlikely = self._unlikely(seen, size)
        by_track: dict[int, list[int]] = {}
        by_instance: dict[int, list[int]] = {}
        for i, j in unlikely:
            by_track.setdefault(i, []).append(j)
            by_instance.setdefault(j, []).append(i)
        contested = []
        for (i, j), distance in unlikely.items():
            is_alone = len(by_track[i]) == len(by_instance[j]) == 1
            # Where the place alone is similar enough, the masks need not be compared.
            if is_alone and _similarity(0.0, distance) >= LEAST_SIMILARITY:
                found[j] = self._tracks[i]
            else:
                contested.append((i, j))
        if contested:
            self._associate_by_masks(seen, contested, unlikely, found)
        return found

    def _associate_by_masks(
        self,
        seen: Sequence[_Seen],
        pairs: Sequence[tuple[int, int]],
        unlikely: dict[tuple[int, int], float],
        found: list[_Track | None],
    ) -> None:
        """Enter the tracks of instances that have several, or are far from their track's place.

        Args:
            seen: the frame's instances.
            pairs: of track and instance, that may be one object.
            unlikely: from ``_unlikely``.
            found: the track of each instance; changed.
        """
        rows, columns = sorted({i for i, _ in pairs}), sorted({j for _, j in pairs})
        tracks, candidates = [self._tracks[i] for i in rows], [seen[j] for j in columns]
        overlap = mask_iou(
            np.stack([track.crop for track in tracks]),
            np.array([track.moved() for track in tracks]),
            np.stack([one.crop for one in candidates]),
            np.array([one.box for one in candidates]),
        ).tolist()
        gain = np.zeros((len(rows), len(columns)))
        row_of = {i: row for row, i in enumerate(rows)}
        column_of = {j: column for column, j in enumerate(columns)}
        for i, j in pairs:
            row, column = row_of[i], column_of[j]
            similarity = _similarity(overlap[row][column], unlikely[i, j])
            gain[row, column] = similarity if similarity >= LEAST_SIMILARITY else 0.0
        known = np.array([track.track_id > 0 for track in tracks])
        sure = np.array([one.is_sure for one in candidates])
        free, waiting = np.ones_like(known), np.ones_like(sure)
        for which, ready in ((known, sure), (known, ~sure), (~known, np.ones_like(sure))):
            left, right = np.flatnonzero(which & free), np.flatnonzero(ready & waiting)
            if not len(left) or not len(right):
                continue
            for a, b in best_pairs(gain[np.ix_(left, right)]):
                found[columns[right[b]]] = tracks[left[a]]
                free[left[a]] = waiting[right[b]] = False

    def _unlikely(self, seen: Sequence[_Seen], size: Size) -> dict[tuple[int, int], float]:
        """Return how unlikely each instance is to be each track, of pairs that are possible."""
        unlikely = {}
        # From left to right, so that of many instances those far from a track are passed over.
        boxes = sorted((*one.box, j) for j, one in enumerate(seen))
        lefts = [box[0] for box in boxes]
        widest = max((x2 - x1 for x1, _, x2, _, _ in boxes), default=0.0)
        for i, track in enumerate(self._tracks):
            x, y, _, _ = track.motion.state
            reach_x, reach_y = track.motion.reach()
            begin, end = bisect_left(lefts, x - reach_x - widest), bisect_right(lefts, x + reach_x)
            for x1, y1, x2, y2, j in boxes[begin:end]:
                if (
                    x1 <= x + reach_x
                    and x2 >= x - reach_x
                    and y1 <= y + reach_y
                    and y2 >= y - reach_y
                    and seen[j].label == track.label
                ):
                    distance = track.motion.distance((x1, y1, x2, y2), size)
                    if distance <= MOST_DEVIATIONS**2:
                        unlikely[i, j] = distance
        return unlikely

    def _begin(self, one: _Seen) -> _Track:
        """Begin a track with an instance."""
        motion, now_s = Motion(one.box), self._time_s
        at = (motion.state[0], motion.state[1])
        track = _Track(one.label, now_s, now_s, motion, one.crop, one.box, at)
        self._tracks.append(track)
        return track

    def _continue(self, track: _Track, one: _Seen, size: Size) -> _Track:
        """Continue a track with an instance."""
        track.motion.correct(one.box, size)
        track.crop, track.shown = one.crop, one.box
        track.shown_at = (track.motion.state[0], track.motion.state[1])
        track.last_s = self._time_s
        track.seen += 1
        return track

    def _name(self, track: _Track) -> None:
        """Give a track that was just seen its id, when it is time."""
        if track.track_id:
            return
        age_s = self._time_s - track.first_s
        soon, later = NAMED_AFTER_S
        if (track.seen >= 3 and age_s >= soon - 1e-6) or (track.seen >= 2 and age_s >= later):
            track.track_id = self._next_id
            self._next_id = self._next_id % (2**31 - 1) + 1

    def _end_lost(self) -> list[EndedTrack]:
        least_s = LEAST_FRAMES * self._interval_s
        lost = [
            track
            for track in self._tracks
            if self._time_s - track.last_s
            > max(LOST_AFTER_S if track.track_id else TENTATIVE_S, least_s)
        ]
        if len(self._tracks) > MOST_TRACKS:
            lost += sorted(self._tracks, key=lambda track: -track.last_s)[MOST_TRACKS:]
        if not lost:
            return []
        gone = {id(track) for track in lost}
        ended = _ended([track for track in self._tracks if id(track) in gone], "lost")
        self._tracks = [track for track in self._tracks if id(track) not in gone]
        return ended


def _seen(instances: Instances, sure: float) -> list[_Seen]:
    """Return the instances of a frame; those with a score of at least ``sure`` are sure."""
    columns = (instances.boxes.tolist(), instances.labels.tolist(), instances.scores.tolist())
    return [
        _Seen(box, label, score >= sure, crop)
        for box, label, score, crop in zip(*columns, binary_crops(instances), strict=True)
    ]


def _similarity(overlap: float, unlikely: float) -> float:
    """Return how similar an instance is to a track, 0 to 1."""
    return 0.5 * overlap + 0.5 * math.exp(-unlikely / 8)


def _ended(tracks: Sequence[_Track], reason: EndReason) -> list[EndedTrack]:
    """Return the tracks that have ended and had an id, as others see them."""
    return [
        EndedTrack(track.track_id, track.label, track.first_s, track.last_s, reason)
        for track in tracks
        if track.track_id
    ]
