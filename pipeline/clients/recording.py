"""Recording: writes the messages of a publisher to MCAP files, as they were sent."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Protocol

from maskcast.engines.errors import InputError
from maskcast.pipeline.clients.clips import ClipRecording
from maskcast.pipeline.clients.segments import ContinuousRecording
from maskcast.pipeline.log import fields
from maskcast.pipeline.outputs.files import check_writable
from maskcast.pipeline.subscriber.losses import LossTracker, Tally
from maskcast.pipeline.subscriber.receiver import Receiver, read_client_keys
from maskcast.pipeline.wire.message import EventHeader, Header, WireError, decode_header
from maskcast.pipeline.wire.recording import RawMessage

FLUSH_S = 0.5
"""Maximum time until a message is in the file, seconds."""

RETRY_S = 10.0
"""Delay before a recording that could not be written is tried again, seconds."""

_logger = logging.getLogger(__name__)


class Recording(Protocol):
    """The files that messages are recorded to."""

    def add(self, message: RawMessage, source: str, header: Header) -> None:
        """Record a message."""

    def skip(self, message: RawMessage, source: str, header: Header) -> None:
        """Note a message that is not written."""

    def abandon(self) -> None:
        """Close the files after an error, as they are; the next message may begin another one."""

    def flush(self) -> None:
        """Write what is pending; called every ``FLUSH_S``."""

    def close(self) -> None:
        """Finish the files."""


class RetriedRecording:
    """A recording that is paused when it cannot be written, and tried again every ``RETRY_S``.

    Pauses are logged (``recording_failed``, ``recording_resumed``).

    Args:
        recording: the recording.
        name: its name, for the log.
        clock_s: a monotonic clock, seconds.

    Attributes:
        problem: why nothing is written at the moment; "" if there is no problem.
        missing: number of messages that were not written.
    """

    def __init__(
        self, recording: Recording, name: Path, clock_s: Callable[[], float] = time.monotonic
    ) -> None:
        self._recording = recording
        self._name = name
        self._clock_s = clock_s
        self._failed_s = 0.0
        self._missing_since = 0
        self._unflushed = 0
        self.problem = ""
        self.missing = 0

    def add(self, message: RawMessage, source: str, header: Header) -> None:
        """Write a message, or count it as missing."""
        if self.problem and self._clock_s() - self._failed_s < RETRY_S:
            self._recording.skip(message, source, header)
            self.missing += 1
            return
        self._unflushed += 1
        if self._try(lambda: self._recording.add(message, source, header)) and self.problem:
            self.flush()  # recording has resumed only once a message is on the disk

    def flush(self) -> None:
        """Write what is pending."""
        if self._unflushed and self._try(self._recording.flush):
            self._unflushed = 0
            if self.problem:
                self.problem = ""
                missing = self.missing - self._missing_since
                shown = fields(file=self._name, missing=missing)
                _logger.warning("recording_resumed", extra=shown)
                self._missing_since = self.missing

    def close(self) -> None:
        """Finish the files.

        Raises:
            InputError: nothing is written at the moment.
        """
        self._try(self._recording.close)
        if self.problem:
            raise InputError(
                f"{self._name}: cannot be written: {self.problem}; {self.missing} messages are "
                "missing; free space on the disk"
            )

    def _try(self, step: Callable[[], None]) -> bool:
        """Do a step; pause after an error, and log it if the reason is new."""
        try:
            step()
        except (OSError, InputError) as error:
            self._recording.abandon()
            reason = getattr(error, "strerror", None) or str(error)
            if reason != self.problem:
                _logger.error("recording_failed", extra=fields(file=self._name, reason=reason))
            self.problem, self._failed_s = reason, self._clock_s()
            self.missing += self._unflushed
            self._unflushed = 0
            return False
        return True


def record(
    endpoint: str,
    path: str | Path,
    *,
    sources: str | Sequence[str] | None = None,
    until_ended: bool = True,
    segment_s: float | None = None,
    segment_bytes: float | None = None,
    disk_bytes: float | None = None,
    on: Sequence[str] = (),
    before_s: float = 5.0,
    after_s: float = 10.0,
    video: bool = False,
    server_key: str | Path | None = None,
    client_key: str | Path | None = None,
) -> Tally:
    """Record what a publisher sends, until its sources have ended or an exception is raised.

    Messages are written unchanged. Repetitions (events that are sent again to other subscribers)
    and messages that cannot be read are left out. If the process is killed, the file is readable
    and lacks the last second at most.

    If the disk is full, the folder gone or a permission lost, recording pauses, is tried again
    every 10 s, and continues in another file with the time in its name.

    Args:
        endpoint: "tcp://host:5555" or "ipc:///path/to/socket"; the publisher may start later.
        path: the file, ``.mcap``. Segments and clips have a time added to this name.
        sources: names; None for all.
        until_ended: end when every source has ended; if False, wait for them to come back.
        segment_s: begin a new file after this many seconds.
        segment_bytes: begin a new file at this size.
        disk_bytes: delete the oldest segments or clips while all are larger than this.
        on: names of events; records only clips around them, one file for each source and time.
        before_s: seconds that a clip holds before its first event; 256 MB of messages at most.
        after_s: seconds that a clip holds after its last event.
        video: write an annotated ``.mp4`` of each clip, if its messages have images.
        server_key: the publisher's ``.key`` file, if it uses keys.
        client_key: your ``.key_secret`` file.

    Returns:
        The counts of messages.

    Raises:
        InputError: an argument is wrong, or a file cannot be written at the start or at the end.
    """
    path = Path(path)
    names = (sources,) if isinstance(sources, str) else sources
    if path.suffix != ".mcap":
        raise InputError(f"{path}: recordings are MCAP files; use a name that ends in .mcap")
    if disk_bytes is not None and segment_s is None and segment_bytes is None and not on:
        raise InputError(
            "disk limit: only segments and clips can be deleted; set the time or size of segments"
        )
    if video and not on:
        raise InputError("video: only clips have one; give the events to record clips of")
    if on and (segment_s is not None or segment_bytes is not None):
        raise InputError("segments: clips are not split; give either segments or events")
    check_writable(path)
    with Receiver(endpoint, names, read_client_keys(server_key, client_key)) as receiver:
        recording: Recording
        if on:
            recording = ClipRecording(
                path,
                on,
                before_s=before_s,
                after_s=after_s,
                disk_bytes=disk_bytes,
                video=video,
            )
        else:
            recording = ContinuousRecording(
                path, segment_s=segment_s, segment_bytes=segment_bytes, disk_bytes=disk_bytes
            )
        losses = LossTracker()
        retried = RetriedRecording(recording, path)
        wanted = None if names is None else tuple(names)
        with closing(retried):
            _receive(receiver, retried, losses, wanted, until_ended)
        losses.tally.malformed += receiver.oversized
        return losses.tally


def _receive(
    receiver: Receiver,
    recording: RetriedRecording,
    losses: LossTracker,
    sources: tuple[str, ...] | None,
    until_ended: bool,
) -> None:
    flush_at_s = time.monotonic() + FLUSH_S
    while True:
        is_over = until_ended and losses.all_ended(sources)
        message = receiver.receive(0 if is_over else max(flush_at_s - time.monotonic(), 0))
        if message is not None and (found := _new_header(message, losses)) is not None:
            recording.add(message, *found)
        if time.monotonic() >= flush_at_s:
            recording.flush()
            flush_at_s = time.monotonic() + FLUSH_S
        if message is None and is_over:
            return


def _new_header(message: RawMessage, losses: LossTracker) -> tuple[str, Header] | None:
    """Return a message's source and header; None if it is a repetition or malformed."""
    try:
        source, header = decode_header(message.parts)
    except WireError:
        losses.tally.malformed += 1
        return None
    if isinstance(header, EventHeader):
        gap = losses.add_event(source, header)
    else:
        gap = losses.add_instances(source, header)
    return None if gap is None else (source, header)
