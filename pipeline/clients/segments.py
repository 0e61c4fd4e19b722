"""Segments: recordings that follow one another, within a limit of the disk space."""

from __future__ import annotations

import logging
import re
from collections.abc import Set
from contextlib import suppress
from datetime import datetime
from itertools import count
from pathlib import Path

from maskcast.pipeline.log import fields
from maskcast.pipeline.wire.kept import KeptEvents
from maskcast.pipeline.wire.message import Header, decode_header
from maskcast.pipeline.wire.recording import RawMessage, RecordingWriter

_logger = logging.getLogger(__name__)


class ContinuousRecording:
    """Records all messages, in one file or in segments that each begin with the kept events.

    Args:
        path: the file; segments get the time of their first message: ``NAME-YYYYMMDD-hhmmss.mcap``,
            as does the file that follows one that could not be written.
        segment_s: begin a new file after this many seconds.
        segment_bytes: begin a new file at this size.
        disk_bytes: delete the oldest segments while all of them are larger than this.

    Raises:
        InputError: a file cannot be written.
    """

    def __init__(
        self,
        path: Path,
        *,
        segment_s: float | None = None,
        segment_bytes: float | None = None,
        disk_bytes: float | None = None,
    ) -> None:
        self._path = path
        self._segment_s = segment_s
        self._segment_bytes = segment_bytes
        self._disk_bytes = disk_bytes
        self._segmented = segment_s is not None or segment_bytes is not None
        self._kept = KeptEvents()
        self._began_ns = 0
        self._writer = None if self._segmented else RecordingWriter(path)

    def add(self, message: RawMessage, source: str, header: Header) -> None:
        """Record a message.

        Raises:
            InputError, OSError: it cannot be written.
        """
        if self._writer is None or (self._segmented and self._is_full(message.received_ns)):
            self._begin(message.received_ns)
        assert self._writer is not None
        self._writer.write(message, header)
        self._kept.add(source, header, message.parts)

    def skip(self, message: RawMessage, source: str, header: Header) -> None:
        """Leave a message out, but keep an event for the beginning of the next file."""
        self._kept.add(source, header, message.parts)

    def abandon(self) -> None:
        """Close the file after an error. The next message begins another one."""
        if self._writer is not None:
            self._writer.abandon()
            self._writer = None

    def flush(self) -> None:
        """Write what is pending."""
        if self._writer is not None:
            self._writer.flush()
            if self._segmented:
                self._delete_oldest()

    def close(self) -> None:
        """Finish the file."""
        if self._writer is not None:
            self._writer.close()
            if self._segmented:
                self._delete_oldest()
            self._writer = None

    def _is_full(self, now_ns: int) -> bool:
        assert self._writer is not None
        is_late = self._segment_s is not None and now_ns - self._began_ns >= self._segment_s * 1e9
        is_large = self._segment_bytes is not None and self._writer.size >= self._segment_bytes
        return is_late or is_large

    def _begin(self, now_ns: int) -> None:
        self.close()
        self._began_ns = now_ns
        self._writer = RecordingWriter(free_path(self._path, now_ns))
        for parts in self._kept.messages():
            self._writer.write(RawMessage(parts, now_ns), decode_header(parts)[1])

    def _delete_oldest(self) -> None:
        assert self._writer is not None
        delete_oldest(self._path, self._disk_bytes, {self._writer.path})


def delete_oldest(path: Path, limit_bytes: float | None, in_use: Set[Path]) -> None:
    """Delete the oldest segments or clips of a recording until the others are within a limit.

    Args:
        path: the name that theirs are made from. The ``.mp4`` of a clip counts as a part of it.
        limit_bytes: None for no limit.
        in_use: files that are not deleted.
    """
    if limit_bytes is None:
        return
    sizes = {file: sum(map(_size, (file, file.with_suffix(".mp4")))) for file in segments(path)}
    total = sum(sizes.values())
    for file, size in sizes.items():
        if total <= limit_bytes:
            return
        if file not in in_use:
            file.unlink(missing_ok=True)
            file.with_suffix(".mp4").unlink(missing_ok=True)
            total -= size
            shown = fields(file=file, bytes=size, limit_bytes=int(limit_bytes))
            _logger.warning("recording_deleted", extra=shown)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def free_path(path: Path, time_ns: int, suffix: str = "") -> Path:
    """Return an unused path with ``time_ns`` (UTC nanoseconds) in its name, as local time."""
    stem = f"{path.stem}-{datetime.fromtimestamp(time_ns / 1e9):%Y%m%d-%H%M%S}{suffix}"
    for number in count(1):
        name = stem if number == 1 else f"{stem}.{number}"
        free = path.with_name(name + path.suffix)
        if not free.exists():
            return free
    raise AssertionError


def segments(path: Path) -> list[Path]:
    """Return the segments or clips of a recording, the oldest first."""
    stem, suffix = re.escape(path.stem), re.escape(path.suffix)
    source = "[A-Za-z0-9][A-Za-z0-9._-]*"
    pattern = re.compile(rf"{stem}-\d{{8}}-\d{{6}}(-{source})?(\.\d+)?{suffix}", re.ASCII)
    found = []
    with suppress(FileNotFoundError):
        found = [other for other in path.parent.iterdir() if pattern.fullmatch(other.name)]
    return sorted(found, key=lambda other: (other.stat().st_mtime_ns, other.name))
