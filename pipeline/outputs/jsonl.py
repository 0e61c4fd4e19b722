"""JSON lines: one object for each frame, and the recorder that writes them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np

from maskcast.engines.errors import InputError
from maskcast.engines.instances import Instances
from maskcast.pipeline.frame import Frame
from maskcast.pipeline.outputs.recorder import Published


class Segmentation(msgspec.Struct, frozen=True):
    """A mask as COCO's compressed run-length code; ``size`` is height, width."""

    size: tuple[int, int]
    counts: str


class InstanceRecord(msgspec.Struct, frozen=True):
    """One instance: its class, its score, its box (x1 y1 x2 y2, source pixels) and its mask."""

    label: str
    score: float
    box: list[float]
    segmentation: Segmentation | None


class FrameRecord(msgspec.Struct, frozen=True):
    """One frame as a line of JSON: the same for ``run --jsonl`` and ``watch --json``."""

    source: str
    seq: int
    pts_s: float | None
    capture_ns: int
    age_ms: float
    lost_before: int
    width: int
    height: int
    instances: list[InstanceRecord]


def instance_records(instances: Instances, label_names: Sequence[str]) -> list[InstanceRecord]:
    """Turn instances into records: boxes to a hundredth of a pixel, scores to four digits."""
    boxes = np.round(instances.boxes.astype(np.float64), 2).tolist()
    scores = np.round(instances.scores.astype(np.float64), 4).tolist()
    names = [label_name(label, label_names) for label in instances.labels.tolist()]
    size = (instances.height, instances.width)
    masks = (
        [None] * len(instances)
        if instances.masks is None
        else [Segmentation(size, counts.decode()) for counts in instances.counts()]
    )
    return [
        InstanceRecord(label=name, score=score, box=box, segmentation=mask)
        for name, score, box, mask in zip(names, scores, boxes, masks, strict=True)
    ]


def label_name(label: int, label_names: Sequence[str]) -> str:
    """Name a label; by its number while a publisher's table of names has not arrived."""
    return label_names[label] if 0 <= label < len(label_names) else str(label)


class JsonlRecorder:
    """Writes one ``FrameRecord`` a line.

    Every line goes to the operating system whole and at once, so the file of a process that was
    killed ends with a complete line.

    Args:
        path: the file; what it held before is gone.
        label_names: the model's names, indexed by label.

    Raises:
        InputError: the file cannot be written.
    """

    def __init__(self, path: Path, label_names: Sequence[str]) -> None:
        self._label_names = label_names
        try:
            self._file = path.open("wb")
        except OSError as error:
            raise InputError(f"{path}: cannot be written: {error.strerror}") from None

    def write(self, frame: Frame, instances: Instances, published: Published) -> None:
        """Append one frame of any source."""
        record = FrameRecord(
            source=frame.source,
            seq=published.seq,
            pts_s=frame.pts_s,
            capture_ns=frame.capture_ns,
            age_ms=round((time.time_ns() - frame.capture_ns) / 1e6, 3),
            lost_before=published.lost_before,
            width=instances.width,
            height=instances.height,
            instances=instance_records(instances, self._label_names),
        )
        self._file.write(msgspec.json.encode(record) + b"\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()
