"""Tracker: gives the instances of one source's frames the ids of the objects that they are."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from maskcast.engines.instances.instances import Instances
from maskcast.engines.instances.masks import MASK_SIZE
from maskcast.pipeline.tracking.assignment import best_pairs
from maskcast.pipeline.tracking.motion import MOST_DEVIATIONS, Motion
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
        self._size: tuple[int, int] | None = None
        self._time_s = 0.0
        self._interval_s = 0.0  # between frames, lately
        self._motion = Motion()
        self._tracks: dict[str, NDArray[Any]] = {
            "ids": np.zeros(0, np.int32),
            "labels": np.zeros(0, np.int32),
            "seen": np.zeros(0, np.int64),  # instances so far
            "first_s": np.zeros(0),
            "last_s": np.zeros(0),
            # The last instance's mask, its box, and where the object's centre was believed to be.
            "crops": np.zeros((0, MASK_SIZE, MASK_SIZE), np.uint8),
            "shown": np.zeros((0, 4)),
            "shown_at": np.zeros((0, 2)),
        }

    def __len__(self) -> int:
        return len(self._motion)

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
        elif not self._time_s <= time_s <= self._time_s + TIME_JUMP_S and len(self):
            ended += self.end("time")
        passed_s = time_s - self._time_s if len(self) else 0.0
        if passed_s > 0:
            known_s = self._interval_s or passed_s
            self._interval_s = known_s + 0.2 * (passed_s - known_s)
        self._motion.predict(passed_s)
        self._size, self._time_s = size, time_s
        self._motion.frame = np.array(size, np.float64)
        ended += self._end_lost()

        boxes = instances.boxes.astype(np.float64)
        crops = binary_crops(instances)
        row_of = self._associate(instances, boxes, crops)
        found, new = np.flatnonzero(row_of >= 0), np.flatnonzero(row_of < 0)
        rows = row_of[found]
        self._motion.correct(rows, boxes[found])
        self._tracks["crops"][rows], self._tracks["shown"][rows] = crops[found], boxes[found]
        self._tracks["shown_at"][rows] = self._motion.state[rows, :2]
        self._tracks["last_s"][rows] = time_s
        self._tracks["seen"][rows] += 1
        row_of[new] = np.arange(len(self), len(self) + len(new))
        self._begin(new, instances, boxes, crops)
        self._name(row_of)
        return Update(self._tracks["ids"][row_of], tuple(ended))

    def end(self, reason: EndReason) -> list[EndedTrack]:
        """End all tracks; ids go on."""
        ended = self._ended(np.ones(len(self), np.bool_), reason)
        self._keep(np.zeros(len(self), np.bool_))
        return ended

    def _associate(
        self, instances: Instances, boxes: NDArray[np.float64], crops: NDArray[np.uint8]
    ) -> NDArray[np.intp]:
        """Return the row of each instance's track, -1 where it has none."""
        row_of = np.full(len(boxes), -1)
        if not len(self) or not len(boxes):
            return row_of
        unlikely = self._motion.distances(boxes)
        moved = np.tile(self._motion.state[:, :2] - self._tracks["shown_at"], 2)
        overlap = mask_iou(self._tracks["crops"], self._tracks["shown"] + moved, crops, boxes)
        similarity = 0.5 * overlap + 0.5 * np.exp(-unlikely / 8)
        possible = (similarity >= LEAST_SIMILARITY) & (unlikely <= MOST_DEVIATIONS**2)
        possible &= self._tracks["labels"][:, None] == instances.labels[None]
        similarity[~possible] = 0
        sure = instances.scores >= self._sure
        known = self._tracks["ids"] > 0
        free, waiting = np.ones(len(self), np.bool_), np.ones(len(boxes), np.bool_)
        for tracks, candidates in ((known, sure), (known, ~sure), (~known, np.ones_like(sure))):
            rows, columns = np.flatnonzero(tracks & free), np.flatnonzero(candidates & waiting)
            if not len(rows) or not len(columns):
                continue
            for i, j in best_pairs(similarity[np.ix_(rows, columns)]):
                row_of[columns[j]] = rows[i]
                free[rows[i]] = waiting[columns[j]] = False
        return row_of

    def _begin(
        self,
        new: NDArray[np.intp],
        instances: Instances,
        boxes: NDArray[np.float64],
        crops: NDArray[np.uint8],
    ) -> None:
        """Begin tracks with instances."""
        first, count = len(self), len(new)
        self._motion.add(boxes[new])
        beginning = {
            "ids": np.zeros(count, np.int32),
            "labels": instances.labels[new],
            "seen": np.ones(count, np.int64),
            "first_s": np.full(count, self._time_s),
            "last_s": np.full(count, self._time_s),
            "crops": crops[new],
            "shown": boxes[new],
            "shown_at": self._motion.state[first:, :2],
        }
        for name, rows in beginning.items():
            self._tracks[name] = np.concatenate([self._tracks[name], rows])

    def _name(self, rows: NDArray[np.intp]) -> None:
        """Give tracks that were just seen their ids, when it is time."""
        age_s = self._time_s - self._tracks["first_s"][rows]
        seen = self._tracks["seen"][rows]
        soon, later = NAMED_AFTER_S
        lasting = (seen >= 3) & (age_s >= soon - 1e-6) | (seen >= 2) & (age_s >= later)
        for row in rows[lasting & (self._tracks["ids"][rows] == 0)].tolist():
            self._tracks["ids"][row] = self._next_id
            self._next_id = self._next_id % (2**31 - 1) + 1

    def _end_lost(self) -> list[EndedTrack]:
        unseen_s = self._time_s - self._tracks["last_s"]
        patience_s = np.where(self._tracks["ids"] > 0, LOST_AFTER_S, TENTATIVE_S)
        lost = unseen_s > np.maximum(patience_s, LEAST_FRAMES * self._interval_s)
        if len(self) > MOST_TRACKS:
            lost[np.argsort(unseen_s, kind="stable")[MOST_TRACKS:]] = True
        if not lost.any():
            return []
        ended = self._ended(lost, "lost")
        self._keep(~lost)
        return ended

    def _ended(self, which: NDArray[np.bool_], reason: EndReason) -> list[EndedTrack]:
        return [
            EndedTrack(
                int(self._tracks["ids"][row]),
                int(self._tracks["labels"][row]),
                float(self._tracks["first_s"][row]),
                float(self._tracks["last_s"][row]),
                reason,
            )
            for row in np.flatnonzero(which & (self._tracks["ids"] > 0))
        ]

    def _keep(self, kept: NDArray[np.bool_]) -> None:
        self._motion.keep(kept)
        self._tracks = {name: rows[kept] for name, rows in self._tracks.items()}
