"""Instances: the objects found in one frame."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maskcast.engines.instances.masks import (
    MASK_SIZE,
    Crossings,
    Patch,
    crop_crossings,
    fill_crossings,
)
from maskcast.engines.instances.polygons import ring_crossings, trace_mask, trace_patch
from maskcast.engines.instances.rle import compress_runs, decode_runs, decompress_runs, encode_runs

__all__ = ["MASK_SIZE", "Instances", "PolygonMasks", "RleMasks"]

VISIBLE = 0.3
"""Minimum score of a keypoint that is drawn and counted."""

_SHOWN = 5
"""Instances whose labels and scores ``repr`` shows."""

Index = int | slice | NDArray[np.bool_] | NDArray[np.integer[Any]]


@dataclass(frozen=True, slots=True, eq=False)
class RleMasks:
    """Masks as run lengths over the whole image, as a publisher can send them.

    Attributes:
        counts: N strings, the ``counts`` of COCO's compressed RLE.
    """

    counts: tuple[bytes, ...]

    def __len__(self) -> int:
        return len(self.counts)

    def __getitem__(self, index: NDArray[np.intp]) -> RleMasks:
        return RleMasks(tuple(self.counts[i] for i in index))


@dataclass(frozen=True, slots=True, eq=False)
class PolygonMasks:
    """Masks as outlines.

    Attributes:
        rings: of each of the N instances its rings, ``[V, 2]`` float32 x and y in source pixels;
            outer rings clockwise on screen, holes counter-clockwise.
    """

    rings: tuple[tuple[NDArray[np.float32], ...], ...]

    def __len__(self) -> int:
        return len(self.rings)

    def __getitem__(self, index: NDArray[np.intp]) -> PolygonMasks:
        return PolygonMasks(tuple(self.rings[i] for i in index))


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Instances:
    """The objects found in one frame: arrays of one length N that are indexed together.

    ``instances[3]``, ``instances[:10]`` and ``instances[instances.labels == 1]`` are Instances too.

    Attributes:
        width, height: size of the source image, pixels.
        boxes: ``[N, 4]`` float32, x1 y1 x2 y2 in source pixels, inside the image.
        scores: ``[N]`` float32 in 0..1, descending.
        labels: ``[N]`` int32, index into the model's label names; 0, the background, never occurs.
        masks: ``[N, 28, 28]`` uint8, probability x 255 inside the box, as the network gives it; or
            run lengths or outlines, if a message carried those; or None without masks. ``patch``,
            ``mask``, ``rle`` and ``polygons`` accept every form.
        track_ids: ``[N]`` int32, which object each instance is: 1 and up, the same number from
            frame to frame; 0 where an instance has no track yet. None where nothing is tracked.
        keypoints: ``[N, K, 3]`` float32, x and y in source pixels, inside the image, and a score in
            0..1; in the order of the model's keypoint names. None where no pose was estimated.
    """

    width: int
    height: int
    boxes: NDArray[np.float32]
    scores: NDArray[np.float32]
    labels: NDArray[np.int32]
    masks: NDArray[np.uint8] | RleMasks | PolygonMasks | None = None
    track_ids: NDArray[np.int32] | None = None
    keypoints: NDArray[np.float32] | None = None

    def __post_init__(self) -> None:
        count = len(self.boxes)
        for array in (self.scores, self.labels, self.masks, self.track_ids, self.keypoints):
            if array is not None and len(array) != count:
                raise ValueError(f"the arrays of Instances differ in length: {self._lengths()}")

    def _lengths(self) -> dict[str, int]:
        names = ("boxes", "scores", "labels", "masks", "track_ids", "keypoints")
        arrays = {name: getattr(self, name) for name in names}
        return {name: len(array) for name, array in arrays.items() if array is not None}

    @classmethod
    def empty(cls, width: int, height: int) -> Instances:
        """Make the Instances of an image without objects."""
        return cls(
            width,
            height,
            boxes=np.zeros((0, 4), dtype=np.float32),
            scores=np.zeros(0, dtype=np.float32),
            labels=np.zeros(0, dtype=np.int32),
            masks=np.zeros((0, MASK_SIZE, MASK_SIZE), dtype=np.uint8),
        )

    def __len__(self) -> int:
        return len(self.boxes)

    def __repr__(self) -> str:
        text = f"<Instances: {len(self)} in {self.width}x{self.height}"
        if len(self):
            more = ", ..." if len(self) > _SHOWN else ""
            labels = ", ".join(str(label) for label in self.labels[:_SHOWN])
            scores = ", ".join(f"{score:.2f}" for score in self.scores[:_SHOWN])
            text += f", labels {labels}{more}, scores {scores}{more}"
        if self.keypoints is not None:
            text += f", {self.keypoints.shape[1]} keypoints"
        match self.masks:
            case None:
                return text + ", no masks>"
            case RleMasks():
                return text + ", masks as run lengths>"
            case PolygonMasks():
                return text + ", masks as polygons>"
        return text + ", masks as 28x28 crops>"

    def __getitem__(self, index: Index) -> Instances:
        """Select instances; a number gives Instances of length 1. IndexError beyond the end."""
        chosen = np.atleast_1d(np.arange(len(self))[index])
        return replace(
            self,
            boxes=self.boxes[chosen],
            scores=self.scores[chosen],
            labels=self.labels[chosen],
            masks=None if self.masks is None else self.masks[chosen],
            track_ids=None if self.track_ids is None else self.track_ids[chosen],
            keypoints=None if self.keypoints is None else self.keypoints[chosen],
        )

    def patch(self, i: int) -> Patch:
        """Make the mask of instance ``i``, as small as possible: the cheapest form to draw.

        Raises:
            ValueError: there are no masks.
        """
        if isinstance(self.masks, RleMasks):
            runs = decompress_runs(self.masks.counts[i], self.width * self.height)
            return decode_runs(runs, self.width, self.height)
        return fill_crossings(self._crossings(i))

    def mask(self, i: int) -> NDArray[np.bool_]:
        """Make the mask of instance ``i`` for the whole image: ``[height, width]`` bool.

        Raises:
            ValueError: there are no masks.
        """
        x0, y0, pixels = self.patch(i)
        full = np.zeros((self.height, self.width), dtype=np.bool_)
        full[y0 : y0 + pixels.shape[0], x0 : x0 + pixels.shape[1]] = pixels
        return full

    def counts(self) -> tuple[bytes, ...]:
        """Make the compressed ``counts`` of COCO's RLE of every mask.

        Raises:
            ValueError: there are no masks.
        """
        if isinstance(self.masks, RleMasks):
            return self.masks.counts
        runs = [encode_runs(self._crossings(i), self.width, self.height) for i in range(len(self))]
        return tuple(compress_runs(runs))

    def rle(self, i: int) -> dict[str, Any]:
        """Make COCO's RLE of instance ``i``: ``{"size": [height, width], "counts": str}``.

        Raises:
            ValueError: there are no masks.
        """
        return {"size": [self.height, self.width], "counts": self[i].counts()[0].decode("ascii")}

    def polygons(self, i: int) -> list[NDArray[np.float32]]:
        """Trace the outline of instance ``i``: rings ``[V, 2]`` float32, x and y in pixels.

        Outer rings run clockwise on screen, holes counter-clockwise.

        Raises:
            ValueError: there are no masks.
        """
        match self.masks:
            case PolygonMasks(rings):
                return list(rings[i])
            case np.ndarray() as crops:
                return trace_mask(crops[i], self.boxes[i], self.width, self.height)
            case _:
                return trace_patch(self.patch(i))

    def to_coco(self, label_names: Sequence[str] | None = None) -> list[dict[str, Any]]:
        """Make COCO results, one object per instance, ready for JSON.

        Keys: ``category_id``, ``score``, ``bbox`` (x y width height), ``segmentation`` (RLE; absent
        where there are no masks), ``keypoints`` (x y score of each, in one list) and
        ``num_keypoints`` (those that are ``VISIBLE``; both absent without a pose), ``track_id``
        (absent where there are no tracks; 0 for none) and, given the model's names, ``category``.
        """
        objects: list[dict[str, Any]] = []
        all_counts = None if self.masks is None else self.counts()
        for i, (x1, y1, x2, y2) in enumerate(self.boxes.tolist()):
            label = int(self.labels[i])
            found: dict[str, Any] = {"category_id": label, "score": float(self.scores[i])}
            if label_names is not None:
                found["category"] = label_names[label]
            found["bbox"] = [x1, y1, x2 - x1, y2 - y1]
            if self.track_ids is not None:
                found["track_id"] = int(self.track_ids[i])
            if all_counts is not None:
                counts = all_counts[i].decode("ascii")
                found["segmentation"] = {"size": [self.height, self.width], "counts": counts}
            if self.keypoints is not None:
                found["keypoints"] = self.keypoints[i].reshape(-1).tolist()
                found["num_keypoints"] = int((self.keypoints[i, :, 2] >= VISIBLE).sum())
            objects.append(found)
        return objects

    def to_supervision(self, label_names: Sequence[str] | None = None) -> Any:
        """Make a ``supervision.Detections``; its masks take N x height x width bytes.

        ``tracker_id`` is -1 for an instance without a track, as in supervision's trackers. For
        keypoints, use ``to_supervision_keypoints``.
        """
        import supervision

        masks = None
        if self.masks is not None:
            masks = np.zeros((len(self), self.height, self.width), dtype=np.bool_)
            for i in range(len(self)):
                x0, y0, pixels = self.patch(i)
                masks[i, y0 : y0 + pixels.shape[0], x0 : x0 + pixels.shape[1]] = pixels
        return supervision.Detections(
            xyxy=self.boxes.copy(),
            mask=masks,
            confidence=self.scores.copy(),
            class_id=self.labels.astype(np.int64),
            tracker_id=None
            if self.track_ids is None
            else np.where(self.track_ids > 0, self.track_ids, -1).astype(np.int64),
            data=self._class_names(label_names),
        )

    def to_supervision_keypoints(self, label_names: Sequence[str] | None = None) -> Any:
        """Make a ``supervision.KeyPoints`` of N skeletons, in the order of ``to_supervision``.

        Raises:
            ValueError: no pose was estimated.
        """
        import supervision

        if self.keypoints is None:
            raise ValueError("these instances have no keypoints; estimate poses with pose=True")
        return supervision.KeyPoints(
            xy=self.keypoints[..., :2].copy(),
            class_id=self.labels.astype(np.int64),
            keypoint_confidence=self.keypoints[..., 2].copy(),
            detection_confidence=self.scores.copy(),
            visible=self.keypoints[..., 2] >= VISIBLE,
            data=self._class_names(label_names),
        )

    def _class_names(self, label_names: Sequence[str] | None) -> dict[str, NDArray[np.str_]]:
        if label_names is None:
            return {}
        return {"class_name": np.array([label_names[label] for label in self.labels])}

    def _crossings(self, i: int) -> Crossings:
        match self.masks:
            case np.ndarray() as crops:
                return crop_crossings(crops[i], self.boxes[i], self.width, self.height)
            case PolygonMasks(rings):
                return ring_crossings(rings[i])
            case _:
                raise ValueError("these instances have boxes only, no masks")
