"""Tracker: assigns track ids to the instances in the frames of one source."""

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
from maskcast.pipeline.tracking.motion import MAX_DEVIATIONS, Box, Motion, Size, Step
from maskcast.pipeline.tracking.overlap import binary_crops, mask_iou

LOST_AFTER_S = 2.0
"""A track without an instance for longer than this has ended."""

TENTATIVE_LOST_AFTER_S = 0.5
"""The same for a track without an id."""

MIN_FRAMES = 2.5
"""No track ends before this many average frame intervals have passed."""

CONFIRM_AFTER_S = (0.08, 0.25)
"""A track gets its id when it has been detected three times over at least the first time, or twice
over the second. Until then it may be a false alarm, or a part of an object with another track."""

LOW_SCORE_SHARE = 0.25
"""Instances whose scores are in this lowest share of the range of reported scores are associated
in a second round, with the remaining tracks."""

MIN_SIMILARITY = 0.15
"""Minimum similarity of an instance and a track, 0..1; 1 if place and mask agree exactly."""

MAX_TRACKS = 400
"""Maximum number of tracks before a frame is added; those not detected for longest end first."""

TIME_JUMP_S = 10.0
"""A longer gap between frames ends all tracks: the clock has jumped, or a clip has restarted."""

EndReason = Literal["lost", "size", "time", "ended"]


class EndedTrack(NamedTuple):
    """A track that had an id and has ended.

    Attributes:
        track_id: its id, which is not used again.
        label: its label.
        first_s, last_s: times of the first and the last frame with an instance of it, seconds.
        reason: why it ended.
    """

    track_id: int
    label: int
    first_s: float
    last_s: float
    reason: EndReason


class Update(NamedTuple):
    """The result of tracking one frame.

    Attributes:
        track_ids: the track id of each instance, ``[N]`` int32; 0 for none yet.
        ended: the tracks that have ended.
    """

    track_ids: NDArray[np.int32]
    ended: tuple[EndedTrack, ...]


@dataclass(slots=True, eq=False)
class _Track:
    """A tracked object.

    Attributes:
        label: its label.
        first_s, last_s: times of the first and the last frame with an instance of it, seconds.
        motion: its estimated box and speed.
        crop: its last mask, ``[28, 28]`` uint8, 0 or 1; all 1 without masks.
        last_box: the box of its last instance.
        last_centre: its estimated centre at that time, x and y in pixels.
        track_id: 0 for none yet.
        hits: number of instances so far.
    """

    label: int
    first_s: float
    last_s: float
    motion: Motion
    crop: NDArray[np.uint8]
    last_box: Box
    last_centre: tuple[float, float]
    track_id: int = 0
    hits: int = 1

    def moved_box(self) -> Box:
        """Return the box of the last instance, moved with the object."""
        x, y = (self.motion.state[k] - self.last_centre[k] for k in (0, 1))
        x1, y1, x2, y2 = self.last_box
        return x1 + x, y1 + y, x2 + x, y2 + y


class _Detection(NamedTuple):
    """An instance of the current frame.

    Attributes:
        box: its box.
        label: its label.
        is_confident: whether it is associated in the first round (``LOW_SCORE_SHARE``).
        crop: its mask, ``[28, 28]`` uint8, 0 or 1; all 1 without masks.
    """

    box: Box
    label: int
    is_confident: bool
    crop: NDArray[np.uint8]


class Tracker:
    """Tracks the objects of one source.

    An instance is compared with a track by its distance from the track's predicted box, and by the
    overlap of its mask with the track's last mask, moved to the predicted place. Instances with
    high scores are associated first, then those with low scores with the remaining tracks, as in
    ByteTrack (Zhang et al. 2022). Labels are never mixed.

    Args:
        min_score: minimum score of the instances, 0..1.
    """

    def __init__(self, min_score: float) -> None:
        self._confident_score = min_score + LOW_SCORE_SHARE * (1 - min_score)
        self._next_id = 1
        self._size: Size | None = None
        self._time_s = 0.0
        self._interval_s = 0.0  # moving average of the time between frames
        self._tracks: list[_Track] = []

    def __len__(self) -> int:
        return len(self._tracks)

    def update(self, instances: Instances, time_s: float) -> Update:
        """Associate a frame's instances with the tracks.

        Args:
            instances: the frame's instances.
            time_s: when it was captured, seconds of any clock. A step back ends all tracks.
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
        detections = _detections(instances, self._confident_score)
        tracks = [
            self._begin(detection) if track is None else self._continue(track, detection, size)
            for track, detection in zip(self._associate(detections, size), detections, strict=True)
        ]
        for track in tracks:
            self._confirm(track)
        track_ids = np.array([track.track_id for track in tracks], np.int32)
        return Update(track_ids, tuple(ended))

    def end(self, reason: EndReason) -> list[EndedTrack]:
        """End all tracks; new tracks continue with the next id."""
        ended, self._tracks = _ended(self._tracks, reason), []
        return ended

    def _associate(self, detections: Sequence[_Detection], size: Size) -> list[_Track | None]:
        """Return the track of each instance; None for an instance without one."""
        found: list[_Track | None] = [None] * len(detections)
        distances = self._distances(detections, size)
        by_track: dict[int, list[int]] = {}
        by_instance: dict[int, list[int]] = {}
        for i, j in distances:
            by_track.setdefault(i, []).append(j)
            by_instance.setdefault(j, []).append(i)
        contested = []
        for (i, j), distance in distances.items():
            is_only_pair = len(by_track[i]) == len(by_instance[j]) == 1
            # If the distance alone is small enough, the masks do not need to be compared.
            if is_only_pair and _similarity(0.0, distance) >= MIN_SIMILARITY:
                found[j] = self._tracks[i]
            else:
                contested.append((i, j))
        if contested:
            self._associate_by_masks(detections, contested, distances, found)
        return found

    def _associate_by_masks(
        self,
        detections: Sequence[_Detection],
        pairs: Sequence[tuple[int, int]],
        distances: dict[tuple[int, int], float],
        found: list[_Track | None],
    ) -> None:
        """Associate the pairs that the distances alone do not decide; enter them in ``found``.

        Args:
            detections: the frame's instances.
            pairs: indices of the track and the instance of each pair.
            distances: as returned by ``_distances``.
            found: the track of each instance; modified.
        """
        rows, columns = sorted({i for i, _ in pairs}), sorted({j for _, j in pairs})
        tracks, candidates = [self._tracks[i] for i in rows], [detections[j] for j in columns]
        overlap = mask_iou(
            np.stack([track.crop for track in tracks]),
            np.array([track.moved_box() for track in tracks]),
            np.stack([detection.crop for detection in candidates]),
            np.array([detection.box for detection in candidates]),
        ).tolist()
        gain = np.zeros((len(rows), len(columns)))
        row_of = {i: row for row, i in enumerate(rows)}
        column_of = {j: column for column, j in enumerate(columns)}
        for i, j in pairs:
            row, column = row_of[i], column_of[j]
            similarity = _similarity(overlap[row][column], distances[i, j])
            gain[row, column] = similarity if similarity >= MIN_SIMILARITY else 0.0
        known = np.array([track.track_id > 0 for track in tracks])
        confident = np.array([detection.is_confident for detection in candidates])
        is_free, is_waiting = np.ones_like(known), np.ones_like(confident)
        rounds = ((known, confident), (known, ~confident), (~known, np.ones_like(confident)))
        for of_tracks, of_candidates in rounds:
            left = np.flatnonzero(of_tracks & is_free)
            right = np.flatnonzero(of_candidates & is_waiting)
            if not len(left) or not len(right):
                continue
            for a, b in best_pairs(gain[np.ix_(left, right)]):
                found[columns[right[b]]] = tracks[left[a]]
                is_free[left[a]] = is_waiting[right[b]] = False

    def _distances(
        self, detections: Sequence[_Detection], size: Size
    ) -> dict[tuple[int, int], float]:
        """Return ``Motion.distance`` of all possible pairs, by index of track and instance."""
        distances = {}
        # Sorted from left to right, so that instances far from a track are skipped.
        boxes = sorted((*detection.box, j) for j, detection in enumerate(detections))
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
                    and detections[j].label == track.label
                ):
                    distance = track.motion.distance((x1, y1, x2, y2), size)
                    if distance <= MAX_DEVIATIONS**2:
                        distances[i, j] = distance
        return distances

    def _begin(self, detection: _Detection) -> _Track:
        """Begin a track with an instance."""
        motion, now_s = Motion(detection.box), self._time_s
        at = (motion.state[0], motion.state[1])
        track = _Track(detection.label, now_s, now_s, motion, detection.crop, detection.box, at)
        self._tracks.append(track)
        return track

    def _continue(self, track: _Track, detection: _Detection, size: Size) -> _Track:
        """Continue a track with an instance."""
        track.motion.correct(detection.box, size)
        track.crop, track.last_box = detection.crop, detection.box
        track.last_centre = (track.motion.state[0], track.motion.state[1])
        track.last_s = self._time_s
        track.hits += 1
        return track

    def _confirm(self, track: _Track) -> None:
        """Give a track that was just detected its id, if it is due (``CONFIRM_AFTER_S``)."""
        if track.track_id:
            return
        age_s = self._time_s - track.first_s
        soon, later = CONFIRM_AFTER_S
        if (track.hits >= 3 and age_s >= soon - 1e-6) or (track.hits >= 2 and age_s >= later):
            track.track_id = self._next_id
            self._next_id = self._next_id % (2**31 - 1) + 1

    def _end_lost(self) -> list[EndedTrack]:
        least_s = MIN_FRAMES * self._interval_s
        lost = [
            track
            for track in self._tracks
            if self._time_s - track.last_s
            > max(LOST_AFTER_S if track.track_id else TENTATIVE_LOST_AFTER_S, least_s)
        ]
        if len(self._tracks) > MAX_TRACKS:
            lost += sorted(self._tracks, key=lambda track: -track.last_s)[MAX_TRACKS:]
        if not lost:
            return []
        gone = {id(track) for track in lost}
        ended = _ended([track for track in self._tracks if id(track) in gone], "lost")
        self._tracks = [track for track in self._tracks if id(track) not in gone]
        return ended


def _detections(instances: Instances, confident_score: float) -> list[_Detection]:
    """Return a frame's instances; those with at least ``confident_score`` are confident."""
    columns = (instances.boxes.tolist(), instances.labels.tolist(), instances.scores.tolist())
    return [
        _Detection(box, label, score >= confident_score, crop)
        for box, label, score, crop in zip(*columns, binary_crops(instances), strict=True)
    ]


def _similarity(overlap: float, distance: float) -> float:
    """Return the similarity of an instance and a track, 0..1."""
    return 0.5 * overlap + 0.5 * math.exp(-distance / 8)


def _ended(tracks: Sequence[_Track], reason: EndReason) -> list[EndedTrack]:
    """Return an ``EndedTrack`` for each of the tracks that has an id."""
    return [
        EndedTrack(track.track_id, track.label, track.first_s, track.last_s, reason)
        for track in tracks
        if track.track_id
    ]
