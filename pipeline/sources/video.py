"""VideoSource: video files, streams, cameras and screens, decoded with FFmpeg through PyAV."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Generator, Iterator
from itertools import chain
from pathlib import Path

import av
import av.container
import av.error
import msgspec
from av.codec.hwaccel import HWAccel
from av.video.stream import VideoStream

from maskcast.engines.errors import InputError
from maskcast.engines.memory import give_back_memory
from maskcast.pipeline.configuration.config import (
    DECODE_DEVICES,
    ConfinedSourceConfig,
    DecodeDevice,
    SourceConfig,
)
from maskcast.pipeline.frame import Clock, Frame, Timeline
from maskcast.pipeline.log import fields
from maskcast.pipeline.sources.errors import PIPE_ADVICE, opening_error, reading_problem
from maskcast.pipeline.sources.ffmpeg import (
    accelerator,
    device_problem,
    ffmpeg_address,
    ffmpeg_format,
    ffmpeg_options,
    open_device,
)
from maskcast.pipeline.sources.files import VIDEO_SUFFIXES, Fifo, is_fifo, list_files
from maskcast.pipeline.sources.host_proxy import HostProxy
from maskcast.pipeline.sources.source import Source, SourceLostError, oversize
from maskcast.pipeline.url import (
    is_local,
    local_path,
    redact,
    scheme,
    shorten,
)

_logger = logging.getLogger(__name__)

_FULL_HD = 1920 * 1088
"""Pixels of a frame up to which one thread decodes fast enough."""

_DAMAGED_READS_LIMIT = 100
"""Maximum number of consecutive read errors without a packet in between; then a file ends."""

_SENDER_CLOCK_TOLERANCE_NS = 10_000_000_000
"""A camera's clock that differs by more than this is assumed to be unset and is ignored."""

_NO_TIMESTAMPS = 0x80
"""FFmpeg's AVFMT_NOTIMESTAMPS: a format without times, for which FFmpeg assumes 25 per second."""

_ENDLESS_FORMATS = frozenset({"mpjpeg", "hls", "dash"})
"""FFmpeg formats whose size over HTTP does not tell whether the stream ends."""


class VideoSource(Source):
    """A video file, a folder of them, a pipe, a stream, a V4L2 camera or an X11 screen.

    The videos of a folder are read in the order of their names, as one video with continuous times.
    One that cannot be read is skipped, counted in ``corrupt``, and logged. With the policy
    ``latest`` a file is played in real time, like a camera.

    With ``decode: cuda`` or ``vaapi`` a video is decoded in software if the device cannot be
    opened, does not support the video, or returns no frame; see ``Frame.decoder``. This class
    treats ``auto`` as ``software``: the decode stage has replaced it.

    Args:
        config: the source.
        stopping: an event that stops the source when it is set, at the next packet.
        on_packet: called with every packet that arrives, before its frames.
    """

    def __init__(
        self,
        config: SourceConfig,
        stopping: threading.Event | None = None,
        on_packet: Callable[[], None] | None = None,
    ) -> None:
        super().__init__(config, stopping)
        self._on_packet = on_packet
        self._container: av.container.InputContainer | None = None
        self._fifo: Fifo | None = None
        self._proxy: HostProxy | None = None
        self._url = config.url  # of the video that is open: in a folder there are several
        self._is_folder = is_local(config.url) and local_path(config.url).is_dir()
        self._stream: VideoStream | None = None
        self._device: DecodeDevice | None = None
        if config.decode in DECODE_DEVICES and not device_problem(config.decode):
            self._device = config.decode
        self._has_clock = True
        self._index = 0
        self._first: Iterator[Frame] = iter(())
        self._frames: Generator[Frame] | None = None

    def open(self) -> None:
        """Open the source and decode its first frame.

        Raises:
            InputError: it cannot be opened, or has no frames.
        """
        self._frames = self._read()
        try:
            first = next(self._frames, None)
        except SourceLostError as lost:
            raise InputError(str(lost)) from None
        stream = self._stream
        if first is None or stream is None:
            url = self._config.url
            advice = f"; {PIPE_ADVICE}" if is_fifo(local_path(url)) else ""
            raise InputError(f"{redact(url)}: the video contains no frames{advice}")
        self.width, self.height = first.decoded.width, first.decoded.height
        rate = stream.average_rate or stream.guessed_rate
        self.fps = float(rate) if rate and self._has_clock else None
        is_single_pass = not (self.live or self._config.loop or self._is_folder)
        self.frame_count = self._count(stream) if is_single_pass else None
        self._first = iter([first])  # an iterator releases the frame once it is yielded

    def __iter__(self) -> Iterator[Frame]:
        assert self._frames is not None
        yield from self._play(chain(self._first, self._frames))

    def close(self) -> None:
        """Close the container: PyAV leaks decoders and sockets of containers left open.

        An unfinished iteration ends; with PyAV alone it would read freed memory.
        """
        if self._frames is not None:
            self._frames.close()
        self._on_packet = None  # its owner often refers to this source: a reference cycle
        self._close_container()

    def _close_container(self) -> None:
        if self._container is not None:
            self._container.close()
            self._container = None
        if self._fifo is not None:
            self._fifo.close()
            self._fifo = None
        if self._proxy is not None:
            self._proxy.close()
            self._proxy = None

    def _open(self) -> VideoStream:
        config = msgspec.structs.replace(self._config, url=self._url)
        url, began_s = redact(config.url), time.monotonic()
        try:
            container = self._open_container(config)
        except (av.error.FFmpegError, OSError, ValueError) as error:
            if self._device is not None and open_device(self._device):  # the device is gone
                self._device = None
                self._close_container()
                return self._open()
            if self._proxy is not None and self._proxy.refused_host:
                raise InputError(
                    f"{url}: leads to another host, {self._proxy.refused_host!r}; add the URL on "
                    "that host instead, if it is allowed"
                ) from None
            raise opening_error(config, error, time.monotonic() - began_s) from None
        self._container = container
        self.has_audio = len(container.streams.audio) > 0
        if not container.streams.video:
            content = "only audio" if container.streams.audio else "no frames"
            raise InputError(f"{url}: not a video, it contains {content}")
        stream = container.streams.video[0]
        # Despite PyAV's types, a stream without a decoder has no codec context.
        if getattr(stream, "codec_context", None) is None:
            raise InputError(f"{url}: FFmpeg has no decoder for this video; use H.264, for example")
        if problem := oversize(stream.width, stream.height):
            raise InputError(f"{url}: {problem}")
        self.live = not is_local(config.url) and not _is_finite(container)
        no_timestamps = container.format.flags & _NO_TIMESTAMPS
        self._has_clock = not (self.live and (no_timestamps or container.format.name == "mpjpeg"))
        # Frame threads decode faster, but each holds back one frame, which adds latency to a
        # camera. They also take 40 % more CPU time, which up to Full HD the model needs more.
        is_large = stream.width * stream.height > _FULL_HD
        stream.thread_type = "SLICE" if self.live else "AUTO" if is_large else "NONE"
        if self._device is not None and stream.codec_context.is_hwaccel:
            stream.thread_type = "NONE"  # each thread would hold one more of the device's frames
        return stream

    def _open_container(self, config: SourceConfig) -> av.container.InputContainer:
        if is_local(config.url) and is_fifo(local_path(config.url)):
            self._fifo = Fifo(local_path(config.url), self._stopping)
            return av.open(self._fifo, "r", hwaccel=self._accelerator())
        options = ffmpeg_options(config)
        if isinstance(config, ConfinedSourceConfig) and scheme(config.url) in ("http", "https"):
            self._proxy = HostProxy(config.url, self.name, config.open_timeout_s)
            options["http_proxy"] = self._proxy.url
        return av.open(
            ffmpeg_address(config.url),
            "r",
            format=ffmpeg_format(config.url),
            container_options=options,
            timeout=(config.open_timeout_s, config.read_timeout_s),
            hwaccel=self._accelerator(),
        )

    def _accelerator(self) -> HWAccel | None:
        return None if self._device is None else accelerator(self._device)

    def _read(self) -> Generator[Frame]:
        """Yield all frames; times continue from one video of a folder, or loop, to the next."""
        offset_s = 0.0
        while True:
            index_before = self._index
            for url in self._urls():
                self._url, last_s = url, None
                try:
                    for frame in self._decode_video():
                        if frame.pts_s is not None:
                            frame.pts_s += offset_s
                            last_s = frame.pts_s
                        yield frame
                except (InputError, SourceLostError) as error:
                    if self._is_folder:
                        self._skip(error)
                    elif self._index == 0:
                        raise
                    else:
                        raise SourceLostError(str(error)) from None
                if self._stopping.is_set():
                    return
                if last_s is not None:
                    assert self._stream is not None
                    offset_s = last_s + 1.0 / float(self._stream.average_rate or 25)
                self._close_container()
                give_back_memory()  # the decoder has freed megabytes of frames
            if not self._config.loop or self._index == index_before:
                return

    def _urls(self) -> list[str]:
        if not self._is_folder:
            return [self._config.url]
        try:
            paths = list_files(local_path(self._config.url), VIDEO_SUFFIXES)
        except InputError as error:
            if self._index == 0:
                raise
            raise SourceLostError(str(error)) from None
        return [str(path) for path in paths]

    def _skip(self, error: Exception) -> None:
        self.corrupt += 1
        shown = fields(source=self.name, file=Path(self._url).name, reason=shorten(str(error)))
        _logger.warning("video_unreadable", extra=shown)

    def _decode_video(self) -> Iterator[Frame]:
        """Open the video and decode it, in software if the device returns no frame of it."""
        index_before = self._index
        try:
            self._stream = self._open()
            yield from self._decode(self._stream)
        except SourceLostError:
            if not self._is_device_at_fault(index_before):
                raise
        if self._is_device_at_fault(index_before):
            self._close_container()
            device, self._device = self._device, None
            self._stream = self._open()
            yield from self._decode(self._stream)
            if self._index == index_before:  # the video has no frames, the device may be fine
                self._device = device

    def _is_device_at_fault(self, index_before: int) -> bool:
        return (
            self._device is not None
            and self._index == index_before
            and self._fifo is None  # a pipe can be read only once
            and not self._stopping.is_set()
        )

    def _decode(self, stream: VideoStream) -> Iterator[Frame]:
        begin_ns = time.monotonic_ns()
        for packet in self._packets(stream):
            if self.live:  # waiting for the camera is not work
                begin_ns = time.monotonic_ns()
            try:
                decoded_frames = packet.decode()
            except av.error.InvalidDataError:
                self.corrupt += 1
                continue
            except av.error.FFmpegError as error:
                raise SourceLostError(reading_problem(self._config, error)) from None
            for decoded in decoded_frames:
                yield self._frame(decoded, begin_ns)
                begin_ns = time.monotonic_ns()

    def _packets(self, stream: VideoStream) -> Iterator[av.Packet[VideoStream]]:
        """Yield packets; skip and count unreadable parts of the file."""
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
                raise SourceLostError(reading_problem(self._config, error)) from None

    def _frame(self, decoded: av.VideoFrame, begin_ns: int) -> Frame:
        if problem := oversize(decoded.width, decoded.height):
            raise SourceLostError(f"{redact(self._config.url)}: {problem}")
        timeline = Timeline()
        timeline.start_ns["decode"] = begin_ns
        timeline.end("decode")
        capture_ns, clock = self._capture(decoded)
        frame = Frame(
            source=self.name,
            index=self._index,
            pts_s=decoded.time if self._has_clock else None,
            capture_ns=capture_ns,
            decoded=decoded,
            rotation=round(decoded.rotation / 90) * 90 % 360,
            timeline=timeline,
            clock=clock,
            file=Path(self._url).name if self._is_folder else None,
            decoder=self._decoder(),
        )
        self._index += 1
        return frame

    def _decoder(self) -> str:
        """Return the decoder in use; software is recognised by its pixel format."""
        assert self._stream is not None
        device, pixel_format = self._device, self._stream.codec_context.pix_fmt
        return device if device is not None and pixel_format == device else "software"

    def _capture(self, decoded: av.VideoFrame) -> tuple[int, Clock]:
        """Return when a frame was captured, UTC nanoseconds, and by which clock.

        RTCP sender reports relate a stream's times to the camera's clock (RFC 3550, 6.4.1). The
        first report arrives some seconds after the stream begins.
        """
        now_ns = time.time_ns()
        assert self._container is not None
        epoch_us = self._container.start_time_realtime if self.live else None
        if epoch_us is not None and decoded.time is not None:
            sent_ns = epoch_us * 1000 + round(decoded.time * 1e9)
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


def _is_finite(container: av.container.InputContainer) -> bool:
    """Tell whether a container read over the network has an end: a duration, or a size."""
    if container.duration:
        return True
    return container.format.name not in _ENDLESS_FORMATS and container.size > 0
