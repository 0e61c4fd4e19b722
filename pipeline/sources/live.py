"""LiveSource: a camera or network stream that is reopened whenever its connection is lost."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator, Iterator
from itertools import chain

from maskcast.engines.errors import InputError
from maskcast.pipeline.configuration.config import SourceConfig
from maskcast.pipeline.frame import Frame
from maskcast.pipeline.inbox import InboxClosed
from maskcast.pipeline.sources.backoff import Backoff
from maskcast.pipeline.sources.connection import Connection
from maskcast.pipeline.sources.source import AccessDeniedError, Source, SourceLostError
from maskcast.pipeline.sources.state import OnStateChange, SourceState, StateMachine
from maskcast.pipeline.url import redact

FIRST_WAIT_S, LONGEST_WAIT_S = 0.1, 0.8
"""Bounds of the waits between attempts: a camera that comes back delivers frames within 2 s."""

FIRST_DENIED_WAIT_S, LONGEST_DENIED_WAIT_S = 30.0, 300.0
"""The same after a wrong password: cameras lock an account after too many attempts."""

SETTLED_S = 5.0
"""A connection that has delivered frames for this long resets the backoff."""

KEYFRAME_TIMEOUT_S = 30.0
"""How long a stream that sends packets may take to deliver its first frame, a key frame."""

OPEN_GRACE_S = 1.0
"""A connection that does not open is abandoned this long after FFmpeg's own timeout."""

MAX_HANGING = 4
"""While this many abandoned connections hang in a read, no new one is made."""

STALLED_SHARE = 0.4
"""A source is stalled after this share of the silence that makes it reconnect."""

MAX_STEP_S = 10.0
"""A larger step between two frames is treated as a jump of the stream's clock."""

_POLL_S = 0.2
_CLOSE_S = 0.5


class LiveSource(Source):
    """An RTSP, RTMP, UDP or HTTP stream, a V4L2 camera or a screen: ends when it is stopped.

    The first connection is also retried until it succeeds. An HTTP URL may turn out to be a finite
    video, which is read once, like a file.

    Frame indices and presentation times continue across reconnects.

    Args:
        config: the source.
        on_change: called with every change of state, on the thread that opens and iterates.
        stopping: an event that stops the source when it is set, also while it opens.
    """

    def __init__(
        self,
        config: SourceConfig,
        on_change: OnStateChange | None = None,
        stopping: threading.Event | None = None,
    ) -> None:
        super().__init__(config, stopping)
        self._machine = StateMachine(
            STALLED_SHARE * config.read_timeout_s, on_change or (lambda change: None)
        )
        self._backoff = Backoff(FIRST_WAIT_S, LONGEST_WAIT_S)
        self._denied_backoff = Backoff(FIRST_DENIED_WAIT_S, LONGEST_DENIED_WAIT_S)
        self._clock = PresentationClock()
        self._hanging: list[Connection] = []
        self._delivering_since_s: float | None = None
        self._index = 0
        self._corrupt_before = 0
        self.live = True
        self._frames = self._read()
        self._first: Iterator[Frame] = iter(())

    def open(self) -> None:
        """Connect, retrying until it succeeds, and read the first frame.

        Raises:
            SourceLostError: it was stopped before its first frame.
            InputError: it is a finite video that cannot be read.
        """
        self._machine.begin()
        first = next(self._frames, None)
        if first is None:
            raise SourceLostError(f"{redact(self._config.url)}: stopped before its first frame")
        self.width, self.height = first.decoded.width, first.decoded.height
        self._first = iter([first])  # an iterator releases the frame once it is yielded

    def __iter__(self) -> Iterator[Frame]:
        for frame in chain(self._first, self._frames):
            if self._stopping.is_set():
                return
            yield frame

    def close(self) -> None:
        """Abandon the connection. If it hangs, its thread closes the container later."""
        self._frames.close()
        deadline_s = time.monotonic() + _CLOSE_S
        for connection in self._hanging:
            connection.join(max(0.0, deadline_s - time.monotonic()))
        self._machine.end("closed")

    def _read(self) -> Generator[Frame]:
        """Yield the frames of one connection after another."""
        while self._wait_for_hanging():
            probe = self._machine.state is SourceState.RECONNECTING
            connection = Connection(self._config, probe=probe)
            connection.start()
            try:
                yield from self._stream(connection)
                return
            except (InputError, SourceLostError) as error:
                if not self.live:
                    raise
                self._machine.lost(str(error))
                wait_s = self._wait_s(error)
            finally:
                self._abandon(connection)
            self._stopping.wait(wait_s)

    def _stream(self, connection: Connection) -> Generator[Frame]:
        """Yield a connection's frames until the source is stopped or a finite video ends.

        Raises:
            InputError, SourceLostError: the connection could not be made, or was lost.
        """
        self._delivering_since_s = None
        self._clock.reconnect()
        quiet_since_s = time.monotonic()
        while not self._stopping.is_set():
            try:
                frames = connection.inbox.take(timeout_s=_POLL_S)
            except InboxClosed:
                if connection.error is not None:
                    raise connection.error from None
                if self.live and not self._stopping.is_set():
                    raise SourceLostError(f"{redact(self._config.url)}: the stream ended") from None
                return
            for frame in frames:
                yield self._place(frame, connection)
                quiet_since_s = time.monotonic()  # time spent in the pipeline is not silence
            if not frames and self.live:
                self._check(connection, quiet_since_s)

    def _place(self, frame: Frame, connection: Connection) -> Frame:
        """Set a frame's index and time so that they continue those of previous connections."""
        source = connection.source
        assert source is not None
        if self._index == 0:
            self.live, self.fps, self.frame_count = source.live, source.fps, source.frame_count
            self.has_audio = source.has_audio
        if self._delivering_since_s is None:
            self._delivering_since_s = time.monotonic()
            self._denied_backoff.reset()
        self._machine.frame()
        self.corrupt = self._corrupt_before + source.corrupt
        if self.live:
            frame.index = self._index
            arrival_s = frame.timeline.end_ns["decode"] / 1e9
            interval_s = 1 / source.fps if source.fps else None
            frame.pts_s = self._clock.time_s(frame.pts_s, arrival_s, interval_s)
        self._index += 1
        return frame

    def _check(self, connection: Connection, quiet_since_s: float) -> None:
        """Check for how long a connection has delivered nothing.

        Raises:
            SourceLostError: it has been silent for too long.
        """
        config, now_s = self._config, time.monotonic()
        last_packet_s, age_s = connection.last_packet_s, now_s - connection.began_s
        problem = ""
        if self._delivering_since_s is not None:
            self._machine.silent(now_s - quiet_since_s)
            if now_s - quiet_since_s >= config.read_timeout_s:
                problem = f"no frame for {config.read_timeout_s:g} s"
        elif last_packet_s is None:
            if age_s >= config.open_timeout_s + OPEN_GRACE_S:
                problem = f"no answer within {config.open_timeout_s:g} s; check the address"
        elif now_s - last_packet_s >= config.read_timeout_s:
            problem = f"no data for {config.read_timeout_s:g} s"
        elif age_s >= max(KEYFRAME_TIMEOUT_S, config.open_timeout_s):
            problem = f"no key frame within {age_s:.0f} s; make the camera send them more often"
        if problem:
            raise SourceLostError(f"{redact(config.url)}: {problem}")

    def _wait_s(self, error: Exception) -> float:
        """Return how long to wait before the next attempt."""
        if isinstance(error, AccessDeniedError):
            return self._denied_backoff.next_s()
        since_s = self._delivering_since_s
        if since_s is not None and time.monotonic() - since_s >= SETTLED_S:
            self._backoff.reset()
        return self._backoff.next_s()

    def _wait_for_hanging(self) -> bool:
        """Wait while too many abandoned connections hang; return False if the source is stopped."""
        while not self._stopping.is_set():
            self._hanging = [connection for connection in self._hanging if connection.is_alive()]
            if len(self._hanging) < MAX_HANGING:
                return True
            self._machine.lost(
                f"{redact(self._config.url)}: {len(self._hanging)} earlier connections hang"
            )
            self._stopping.wait(_POLL_S)
        return False

    def _abandon(self, connection: Connection) -> None:
        connection.abandon()
        self._hanging.append(connection)
        if connection.source is not None:
            self._corrupt_before += connection.source.corrupt


class PresentationClock:
    """Presentation times of a source's frames, in seconds: they start at 0 and strictly increase.

    They follow the steps of the stream's own times. If a time is missing, repeats, goes back or
    jumps, for example after a reconnect or a wraparound, the step is the time that has passed on
    the receiver's clock.

    FFmpeg gives the first frame of an RTSP connection no time and delivers it together with the
    following ones. Therefore the step to the second frame is at least the nominal interval.
    """

    def __init__(self) -> None:
        self._stream_s: float | None = None
        self._arrival_s: float | None = None
        self._time_s = 0.0

    def reconnect(self) -> None:
        """Note a new connection, whose times are unrelated to those of the previous one."""
        self._stream_s = None

    def time_s(
        self, stream_s: float | None, arrival_s: float, interval_s: float | None = None
    ) -> float:
        """Return the time of the next frame.

        Args:
            stream_s: its time on the stream's clock, seconds; None if it has none.
            arrival_s: when it arrived, seconds of a monotonic clock.
            interval_s: the nominal time between two frames, seconds; None if unknown.
        """
        if self._arrival_s is not None:
            step_s = self._step_s(stream_s)
            if step_s is None:
                step_s = max(1e-3, arrival_s - self._arrival_s)
                if self._stream_s is None and stream_s is not None:
                    step_s = max(step_s, interval_s or 0.0)
            self._time_s += step_s
        self._stream_s, self._arrival_s = stream_s, arrival_s
        return self._time_s

    def _step_s(self, stream_s: float | None) -> float | None:
        if stream_s is None or self._stream_s is None:
            return None
        step_s = stream_s - self._stream_s
        return step_s if 1e-6 < step_s <= MAX_STEP_S else None
