"""VideoSource: files, network streams and cameras, decoded with FFmpeg through PyAV."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Generator, Iterator
from itertools import chain

import av
import av.container
import av.error
from av.video.stream import VideoStream

from maskcast.engines.errors import InputError
from maskcast.pipeline.config import SourceConfig
from maskcast.pipeline.frame import Clock, Frame, Timeline
from maskcast.pipeline.sources.source import AccessDeniedError, Pace, Source, SourceLostError
from maskcast.pipeline.url import is_device, is_local, local_path, redact, scheme

_FULL_HD = 1920 * 1088
"""Pixels of a picture, up to which one thread decodes fast enough."""

_DAMAGED_READS_LIMIT = 100
"""So many unreadable stretches in a row, without one packet between them, are the end."""

_RTSP_ANALYSIS_US = 250_000
"""FFmpeg would watch a camera for a second before its first picture; its SDP has told all."""

_SENDER_CLOCK_TOLERANCE_NS = 10_000_000_000
"""A camera whose clock is further off than this has never been set."""


class VideoSource(Source):
    """A video file, an HTTP or RTSP stream, or a V4L2 camera.

    A file that is asked for with the policy ``latest`` is played at its own speed, as a camera
    would deliver it.

    Args:
        config: the source.
        stopping: set, from any thread, it ends the opening and the iteration at the next packet.
        on_packet: called with every packet that comes, before its pictures.

    Raises:
        InputError: it cannot be opened, or holds no pictures.
    """

    def __init__(
        self,
        config: SourceConfig,
        stopping: threading.Event | None = None,
        on_packet: Callable[[], None] | None = None,
    ) -> None:
        super().__init__(config)
        self._config = config
        self._stopping = stopping or self._stopping
        self._on_packet = on_packet
        self._container: av.container.InputContainer | None = None
        self._frames: Generator[Frame] | None = None
        self._index = 0
        try:
            stream = self._open()
            self._frames = self._read(stream)
            first = next(self._frames, None)
            if first is None:
                raise InputError(f"{redact(config.url)}: the video holds no pictures")
        except SourceLostError as lost:
            self.close()
            raise InputError(str(lost)) from None
        except BaseException:
            self.close()
            raise
        self._first = iter([first])  # an iterator lets go of what it has given out: megabytes
        self.width, self.height = first.picture.width, first.picture.height
        rate = stream.average_rate or stream.guessed_rate
        self.fps = float(rate) if rate else None
        self.frame_count = None if self.live or config.loop else self._count(stream)
        self._paced = config.policy == "latest" and not self.live

    def __iter__(self) -> Iterator[Frame]:
        pace = Pace(self._stopping) if self._paced else None
        assert self._frames is not None
        for frame in chain(self._first, self._frames):
            if pace is not None and frame.pts_s is not None:
                decoded_ns = time.monotonic_ns()
                pace.wait(frame.pts_s)
                _postpone(frame, time.monotonic_ns() - decoded_ns)
            if self._stopping.is_set():
                return
            yield frame

    def close(self) -> None:
        """Close the container: PyAV leaks decoders and sockets of containers left open.

        Whoever iterates on finds the end. PyAV itself would read from freed memory.
        """
        if self._frames is not None:
            self._frames.close()
        self._on_packet = None  # who is told of packets often holds this source: a cycle
        self._close_container()

    def _close_container(self) -> None:
        if self._container is not None:
            self._container.close()
            self._container = None

    def _open(self) -> VideoStream:
        began_s = time.monotonic()
        try:
            container = av.open(
                _ffmpeg_address(self._config.url),
                format="v4l2" if is_device(self._config.url) else None,
                container_options=_ffmpeg_options(self._config),
                timeout=(self._config.open_timeout_s, self._config.read_timeout_s),
            )
        except (av.error.FFmpegError, OSError, ValueError) as error:
            kind = AccessDeniedError if isinstance(error, _DENIED) else InputError
            raise kind(_why_not_open(self._config, error, time.monotonic() - began_s)) from None
        self._container = container
        if not container.streams.video:
            held = "only sound" if container.streams.audio else "no pictures"
            raise InputError(f"{redact(self._config.url)}: this is not a video, it holds {held}")
        stream = container.streams.video[0]
        self.live = not is_local(self._config.url) and not container.duration
        # Frame threads decode faster, but hold back one picture each, which a camera cannot afford,
        # and take two fifths more processor time, which up to Full HD the model puts to better use.
        is_large = stream.width * stream.height > _FULL_HD
        stream.thread_type = "SLICE" if self.live else "AUTO" if is_large else "NONE"
        return stream

    def _read(self, stream: VideoStream) -> Generator[Frame]:
        """Yield all pictures; those of a loop's later rounds with times that go on rising."""
        offset_s = 0.0
        while True:
            last_s = None
            for frame in self._decode(stream):
                if frame.pts_s is not None:
                    frame.pts_s += offset_s
                    last_s = frame.pts_s
                yield frame
            if not self._config.loop or self._index == 0 or self._stopping.is_set():
                return
            if last_s is not None:
                offset_s = last_s + 1.0 / float(stream.average_rate or 25)
            self._close_container()
            try:
                stream = self._open()
            except InputError as error:
                raise SourceLostError(str(error)) from None

    def _decode(self, stream: VideoStream) -> Iterator[Frame]:
        begin_ns = time.monotonic_ns()
        for packet in self._packets(stream):
            if self.live:  # waiting for the camera is no work
                begin_ns = time.monotonic_ns()
            try:
                pictures = packet.decode()
            except av.error.InvalidDataError:
                self.corrupt += 1
                continue
            except av.error.FFmpegError as error:
                raise SourceLostError(_lost(self._config, error)) from None
            for picture in pictures:
                yield self._frame(picture, begin_ns)
                begin_ns = time.monotonic_ns()

    def _packets(self, stream: VideoStream) -> Iterator[av.Packet[VideoStream]]:
        """Yield packets; a stretch of the file that cannot be read is skipped and counted."""
        assert self._container is not None
        damaged = 0
        while damaged < _DAMAGED_READS_LIMIT:
            try:
                for packet in self._container.demux(stream):
                    damaged = 0
                    if self._on_packet is not None:
                        self._on_packet()
                    if self._stopping.is_set():
                        return
                    yield packet
                return
            except av.error.InvalidDataError:
                self.corrupt += 1
                damaged += 1
            except av.error.EOFError:
                return
            except (av.error.FFmpegError, OSError) as error:
                raise SourceLostError(_lost(self._config, error)) from None

    def _frame(self, picture: av.VideoFrame, begin_ns: int) -> Frame:
        timeline = Timeline()
        timeline.start_ns["decode"] = begin_ns
        timeline.end("decode")
        capture_ns, clock = self._capture(picture)
        frame = Frame(
            source=self.name,
            index=self._index,
            pts_s=picture.time,
            capture_ns=capture_ns,
            picture=picture,
            rotation=round(picture.rotation / 90) * 90 % 360,
            timeline=timeline,
            clock=clock,
        )
        self._index += 1
        return frame

    def _capture(self, picture: av.VideoFrame) -> tuple[int, Clock]:
        """Return when a picture was captured, UTC nanoseconds, and by whose clock.

        RTCP sender reports tie a stream's times to the camera's clock (RFC 3550, 6.4.1); the first
        comes after some seconds.
        """
        now_ns = time.time_ns()
        assert self._container is not None
        epoch_us = self._container.start_time_realtime if self.live else None
        if epoch_us is not None and picture.time is not None:
            sent_ns = epoch_us * 1000 + round(picture.time * 1e9)
            if abs(sent_ns - now_ns) < _SENDER_CLOCK_TOLERANCE_NS:
                return sent_ns, "sender"
        return now_ns, "receipt"

    def _count(self, stream: VideoStream) -> int | None:
        if stream.frames:
            return stream.frames
        assert self._container is not None
        if self._container.duration and self.fps:
            return round(self._container.duration / av.time_base * self.fps)
        return None


def _postpone(frame: Frame, by_ns: int) -> None:
    """Shift a frame's capture to when it was let go: its wait was not the pipeline's doing."""
    frame.capture_ns = time.time_ns()
    frame.timeline.start_ns["decode"] += by_ns
    frame.timeline.end_ns["decode"] += by_ns


def _ffmpeg_address(url: str) -> str:
    """Return the address for FFmpeg, which would read ``a:b.mp4`` as a protocol ``a``."""
    if is_device(url):
        return str(local_path(url))
    return f"file:{local_path(url)}" if is_local(url) else url


def _ffmpeg_options(config: SourceConfig) -> dict[str, str]:
    if scheme(config.url).startswith("rtsp"):
        return {
            "rtsp_transport": config.rtsp_transport,
            "analyzeduration": str(_RTSP_ANALYSIS_US),
        }
    return {}


_DENIED = (av.error.HTTPUnauthorizedError, av.error.HTTPForbiddenError)


def _why_not_open(config: SourceConfig, error: Exception, waited_s: float) -> str:
    """Say in one line why a source cannot be opened and what to do; FFmpeg's text has the URL."""
    shown = redact(config.url)
    if isinstance(error, av.error.ExitError | av.error.TimeoutError) or (
        not is_local(config.url) and waited_s >= config.open_timeout_s
    ):
        return f"{shown}: no answer within {config.open_timeout_s:g} s; check the address"
    if isinstance(error, ConnectionRefusedError):
        return f"{shown}: connection refused; check the address and that the server is running"
    if isinstance(error, _DENIED):
        return f"{shown}: access denied; put the user and password in: scheme://user:password@…"
    if isinstance(error, av.error.HTTPNotFoundError):
        return f"{shown}: the server has nothing at this path; check the address"
    if isinstance(error, PermissionError):
        return f"{shown}: permission denied; let this user read it"
    if isinstance(error, av.error.InvalidDataError | av.error.EOFError | ValueError):
        return f"{shown}: not a video that FFmpeg can read"
    return f"{shown}: cannot be opened: {_reason(error)}"


def _lost(config: SourceConfig, error: Exception) -> str:
    if isinstance(error, av.error.ExitError | av.error.TimeoutError):
        return f"{redact(config.url)}: nothing came for {config.read_timeout_s:g} s"
    return f"{redact(config.url)}: broke off: {_reason(error)}"


def _reason(error: Exception) -> str:
    code = getattr(error, "errno", None)
    text = getattr(error, "strerror", None) or (os.strerror(code) if code else "")
    return text[:1].lower() + text[1:] if text else type(error).__name__
