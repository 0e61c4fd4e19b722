"""JSON lines: the record of a frame, and the recorder that writes one record per line."""

from __future__ import annotations

import errno
import io
import math
import os
import stat
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import msgspec
import numpy as np

from maskcast.engines.instances.instances import Instances
from maskcast.engines.instances.keypoints import Keypoints
from maskcast.pipeline.frame import Frame
from maskcast.pipeline.outputs.files import (
    FileNames,
    PendingFile,
    check_label_names,
    check_path,
    check_writable,
    expand,
    is_pattern,
)
from maskcast.pipeline.outputs.recorder import Published

STDOUT = "-"
"""The path that means standard output."""


class Segmentation(msgspec.Struct, frozen=True):
    """A mask as COCO's compressed run-length code; ``size`` is height and width, pixels."""

    size: tuple[int, int]
    counts: str


class InstanceRecord(msgspec.Struct, frozen=True):
    """One instance: its class, its score, its box (x1 y1 x2 y2, pixels) and its mask.

    ``track_id`` is absent if the source is not tracked, and None for an instance without a track.
    ``keypoints`` are x, y and score by name, absent if no poses are estimated.
    """

    label: str
    score: float
    box: list[float]
    segmentation: Segmentation | None
    track_id: int | msgspec.UnsetType | None = msgspec.UNSET
    keypoints: dict[str, list[float]] | msgspec.UnsetType = msgspec.UNSET


class FrameRecord(msgspec.Struct, frozen=True):
    """One frame as a line of JSON, the same for ``run --jsonl`` and ``watch --json``.

    ``zones`` and ``lines`` are absent if there are none. ``file``, the file's name, is present only
    in ``run --jsonl``, for a frame from a folder or a single image.
    """

    source: str
    seq: int
    pts_s: float | None
    capture_ns: int
    age_ms: float
    dropped_before: int
    lost_before: int
    width: int
    height: int
    instances: list[InstanceRecord]
    zones: dict[str, int] | msgspec.UnsetType = msgspec.UNSET
    lines: dict[str, dict[str, int]] | msgspec.UnsetType = msgspec.UNSET
    file: str | msgspec.UnsetType = msgspec.UNSET


def instance_records(
    instances: Instances, label_names: Sequence[str], keypoints: Keypoints | None = None
) -> list[InstanceRecord]:
    """Return the records of instances, with positions to 0.01 pixels and scores to 0.0001."""
    boxes = np.round(instances.boxes.astype(np.float64), 2).tolist()
    scores = np.round(instances.scores.astype(np.float64), 4).tolist()
    names = [label_name(label, label_names) for label in instances.labels.tolist()]
    size = (instances.height, instances.width)
    masks = (
        [None] * len(instances)
        if instances.masks is None
        else [Segmentation(size, counts.decode()) for counts in instances.counts()]
    )
    track_ids: list[int | msgspec.UnsetType | None] = (
        [msgspec.UNSET] * len(instances)
        if instances.track_ids is None
        else [track_id or None for track_id in instances.track_ids.tolist()]
    )
    poses = _poses(instances, keypoints)
    return [
        InstanceRecord(
            label=name, score=score, box=box, segmentation=mask, track_id=track_id, keypoints=pose
        )
        for name, score, box, mask, track_id, pose in zip(
            names, scores, boxes, masks, track_ids, poses, strict=True
        )
    ]


def _poses(
    instances: Instances, keypoints: Keypoints | None
) -> list[dict[str, list[float]] | msgspec.UnsetType]:
    if instances.keypoints is None or keypoints is None:
        return [msgspec.UNSET] * len(instances)
    points = instances.keypoints.astype(np.float64)
    points[..., :2] = np.round(points[..., :2], 2)
    points[..., 2] = np.round(points[..., 2], 4)
    return [dict(zip(keypoints.names, pose, strict=True)) for pose in points.tolist()]


def label_name(label: int, label_names: Sequence[str]) -> str:
    """Return the name of a label, or its number if the table of names has not arrived."""
    return label_names[label] if 0 <= label < len(label_names) else str(label)


class JsonlRecorder:
    """Writes one ``FrameRecord`` per line.

    Every line is written immediately and without buffering, so the file of a killed process ends
    with a complete line.

    Args:
        path: the file, opened at the first frame, which replaces an existing file. May contain
            ``strftime`` directives (``out-%Y%m%d.jsonl``). ``-`` is standard output. A device or a
            named pipe is written directly.
        label_names: the model's class names, indexed by label.
        append: append to an existing file.
        segment_s: begin a new file after this many seconds of capture time.
        segment_bytes: begin a new file when this many bytes are reached.
        keypoints: the model's keypoints; None for a model without keypoints.

    Raises:
        InputError: the file cannot be written.
        TypeError: an argument has the wrong type.
        ValueError: ``append`` is combined with segments.
    """

    name = "jsonl"

    def __init__(
        self,
        path: str | os.PathLike[str],
        label_names: Sequence[str],
        *,
        append: bool = False,
        segment_s: float | None = None,
        segment_bytes: float | None = None,
        keypoints: Keypoints | None = None,
    ) -> None:
        self._path = check_path(path)
        self._keypoints = keypoints
        self._label_names = check_label_names(label_names)
        self._append = append
        self._segment_s = math.inf if segment_s is None else segment_s
        self._segment_bytes = math.inf if segment_bytes is None else segment_bytes
        segmented = segment_s is not None or segment_bytes is not None
        if append and segmented:
            raise ValueError("append: not together with segment_s or segment_bytes")
        self._names = FileNames(self._path, segmented=segmented)
        self._file: io.FileIO | None = None
        self._pending: PendingFile | None = None
        self._interrupted: Path | None = None
        self._begin_ns = 0
        if str(path) != STDOUT:
            check_writable(self._path)

    def write(self, frame: Frame, instances: Instances, published: Published) -> None:
        """Append one frame of any source.

        Raises:
            OSError: it cannot be written; the file ends with a complete line.
        """
        record = FrameRecord(
            source=frame.source,
            seq=published.seq,
            pts_s=frame.pts_s,
            capture_ns=frame.capture_ns,
            age_ms=round((time.time_ns() - frame.capture_ns) / 1e6, 3),
            dropped_before=published.dropped_before,
            lost_before=0,
            width=instances.width,
            height=instances.height,
            instances=instance_records(instances, self._label_names, self._keypoints),
            zones=dict(published.analysis.zones) or msgspec.UNSET,
            lines={name: dict(n) for name, n in published.analysis.lines.items()} or msgspec.UNSET,
            file=frame.file or msgspec.UNSET,
        )
        line = msgspec.json.encode(record) + b"\n"
        try:
            if self._file is not None and self._is_full(self._file, frame.capture_ns):
                self.close()
                self._interrupted = None
            if self._file is None:
                self._file = self._open(frame.capture_ns)
            self._write_line(self._file, line)
            if self._pending is not None and not self._pending.is_kept:
                self._pending.keep()
        except OSError:
            self._interrupt()
            raise

    def close(self) -> None:
        """Close the file, if one was opened."""
        if self._file is not None:
            self._file.close()
        if self._pending is not None:
            self._pending.discard()
        self._file = self._pending = None

    def _open(self, time_ns: int) -> io.FileIO:
        self._begin_ns = time_ns
        if str(self._path) == STDOUT:
            return io.FileIO(sys.stdout.fileno(), "wb", closefd=False)
        if self._path.exists() and not self._path.is_file():
            # Without O_NONBLOCK a pipe without a reader would block here.
            opened = os.open(self._path, os.O_WRONLY | os.O_NONBLOCK)
            os.set_blocking(opened, True)
            return io.FileIO(opened, "wb")
        if self._interrupted is not None:
            return _open_to_append(self._interrupted)
        if self._append:
            path = expand(self._path, time_ns) if is_pattern(self._path) else self._path
            return _open_to_append(path)
        pending = self._names.next("", time_ns)
        file = io.FileIO(pending.path, "wb")
        self._pending = pending
        return file

    def _is_full(self, file: io.FileIO, time_ns: int) -> bool:
        """Return whether a new file is due.

        Raises:
            FileNotFoundError: the file was deleted.
        """
        status = os.fstat(file.fileno())
        if status.st_nlink == 0 and stat.S_ISREG(status.st_mode):
            raise FileNotFoundError(errno.ENOENT, "the file was deleted", str(self._path))
        elapsed_s = (time_ns - self._begin_ns) / 1e9
        return elapsed_s >= self._segment_s or status.st_size >= self._segment_bytes

    def _write_line(self, file: io.FileIO, line: bytes) -> None:
        """Write a complete line; if that fails, remove the part that was written."""
        is_regular = stat.S_ISREG(os.fstat(file.fileno()).st_mode)
        begin = os.fstat(file.fileno()).st_size
        left = memoryview(line)
        try:
            while left:
                left = left[file.write(left) :]
        except OSError:
            if is_regular:
                with suppress(OSError):
                    file.truncate(begin)
            raise

    def _interrupt(self) -> None:
        """Close the file after an error; the next attempts append to it."""
        if self._pending is not None and self._pending.is_kept:
            self._interrupted = self._pending.path
        with suppress(OSError):
            self.close()


def _open_to_append(path: Path) -> io.FileIO:
    """Open a file to append lines; first end a line that a killed writer left incomplete."""
    file = io.FileIO(path, "ab+")
    if file.seek(0, io.SEEK_END):
        file.seek(-1, io.SEEK_END)
        if file.read(1) != b"\n":
            file.write(b"\n")
    return file
