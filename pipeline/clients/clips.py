"""Clips: recordings around events, one file for each source and time."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from maskcast.engines.errors import InputError
from maskcast.pipeline.clients.segments import delete_oldest, free_path
from maskcast.pipeline.log import fields
from maskcast.pipeline.wire.kept import KeptEvents
from maskcast.pipeline.wire.message import EventHeader, Header, decode_header, topic
from maskcast.pipeline.wire.recording import RawMessage, RecordingWriter

EVENTS = ("zone_entered", "zone_left", "line_crossed", "track_ended", "state", "size", "ended")
"""Events that can start a clip."""

RING_BYTES = 256 << 20
"""Maximum size of the messages held in memory for the time before an event; the oldest are
dropped."""

MAX_CLIP_S = 600.0
"""Maximum length of a clip that further events prolong, seconds; the next event begins another."""

_logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Clip:
    writer: RecordingWriter
    began_ns: int
    until_ns: int


class ClipRecording:
    """Holds the last seconds in memory, and writes a clip when an event occurs.

    Args:
        path: a time and the source's name are added: ``NAME-YYYYMMDD-hhmmss-SOURCE.mcap``.
        on: names of events.
        before_s: seconds before the first event.
        after_s: seconds after the last event.
        disk_bytes: delete the oldest clips while all of them are larger than this.
        video: also write an annotated ``.mp4`` of each clip.

    Raises:
        InputError: an event is unknown.
    """

    def __init__(
        self,
        path: Path,
        on: Sequence[str],
        *,
        before_s: float,
        after_s: float,
        disk_bytes: float | None = None,
        video: bool = False,
    ) -> None:
        for name in on:
            if name not in EVENTS:
                raise InputError(f"event {name!r}: unknown; use {', '.join(EVENTS)}")
        self._path, self._on = path, frozenset(on)
        self._before_ns, self._after_ns = int(before_s * 1e9), int(after_s * 1e9)
        self._disk_bytes = disk_bytes
        self._ring: deque[tuple[str, Header, RawMessage]] = deque()
        self._ring_bytes = 0
        self._kept = KeptEvents()  # those that have left the ring
        self._clips: dict[str, _Clip] = {}
        self._renderer = ThreadPoolExecutor(1, "clip-video") if video else None

    def add(self, message: RawMessage, source: str, header: Header) -> None:
        """Hold a message in memory, and write it if it belongs to a clip.

        Raises:
            InputError, OSError: a clip cannot be written.
        """
        self.skip(message, source, header)
        self._end_clips(message.received_ns)
        is_event = isinstance(header, EventHeader) and header.event in self._on
        clip = self._clips.get(source)
        if clip is not None:
            clip.writer.write(message, header)
        elif is_event:
            clip = self._clips[source] = self._begin(source, message.received_ns)
        if clip is not None and is_event:
            clip.until_ns = message.received_ns + self._after_ns

    def skip(self, message: RawMessage, source: str, header: Header) -> None:
        """Hold a message in memory only."""
        self._ring.append((source, header, message))
        self._ring_bytes += _size(message)
        self._trim(message.received_ns)

    def abandon(self) -> None:
        """Close all clips after an error. The next event begins another one."""
        for clip in self._clips.values():
            clip.writer.abandon()
        self._clips.clear()

    def flush(self) -> None:
        """Write what is pending, and finish clips whose time has passed."""
        self._end_clips(time.time_ns())
        for clip in self._clips.values():
            clip.writer.flush()

    def close(self) -> None:
        """Finish all clips and their videos."""
        try:
            for source in list(self._clips):
                self._end(source)
        finally:
            if self._renderer is not None:
                self._renderer.shutdown()

    def _trim(self, now_ns: int) -> None:
        while self._ring:
            source, header, oldest = self._ring[0]
            if self._ring_bytes <= RING_BYTES and now_ns - oldest.received_ns <= self._before_ns:
                return
            self._ring.popleft()
            self._ring_bytes -= _size(oldest)
            self._kept.add(source, header, oldest.parts)

    def _begin(self, source: str, now_ns: int) -> _Clip:
        """Begin a clip with the kept events and the ring, which holds the event itself."""
        writer = RecordingWriter(free_path(self._path, now_ns, f"-{source}"))
        ring = [(header, message) for name, header, message in self._ring if name == source]
        first_ns = ring[0][1].received_ns if ring else now_ns
        for parts in self._kept.messages((topic(source, "event"),)):
            writer.write(RawMessage(parts, first_ns), decode_header(parts)[1])
        for header, message in ring:
            writer.write(message, header)
        return _Clip(writer, now_ns, now_ns)

    def _end_clips(self, now_ns: int) -> None:
        for source, clip in list(self._clips.items()):
            if now_ns > clip.until_ns or now_ns - clip.began_ns > MAX_CLIP_S * 1e9:
                self._end(source)

    def _end(self, source: str) -> None:
        clip = self._clips[source]
        clip.writer.close()
        del self._clips[source]
        _logger.info("clip_recorded", extra=fields(source=source, file=clip.writer.path))
        delete_oldest(self._path, self._disk_bytes, {c.writer.path for c in self._clips.values()})
        if self._renderer is not None:
            self._renderer.submit(_render, clip.writer.path)


def _size(message: RawMessage) -> int:
    return sum(map(len, message.parts))


def _render(path: Path) -> None:
    """Write the video of a clip; log an error."""
    from maskcast.pipeline.clients.clip_video import render

    try:
        if not render(path, path.with_suffix(".mp4")):
            advice = "publish images with --jpeg-quality"
            _logger.warning("clip_has_no_images", extra=fields(file=path, advice=advice))
    except Exception:
        _logger.exception("clip_video_failed", extra=fields(file=path))
