"""Audio: copied from video files into the recorded files without decoding."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from fractions import Fraction
from itertools import islice
from pathlib import Path

import av
from av.audio.stream import AudioStream
from av.container import InputContainer, OutputContainer

from maskcast.pipeline.configuration.config import SourceConfig
from maskcast.pipeline.log import fields
from maskcast.pipeline.url import is_device, is_local, local_path

_TRIAL_PACKETS = 5
"""Number of packets that are copied into memory before a file is created, as a test."""

_OPTIONS = {"protocol_whitelist": "file,crypto,data"}
"""The same as for the video of a local file (``pipeline/sources/ffmpeg.py``)."""

_logger = logging.getLogger(__name__)


def audio_file(config: SourceConfig) -> Path | None:
    """Return the file that a source's audio can be copied from; None for other sources.

    The audio of a looped file is not copied, because its times start again with every loop.
    """
    if not is_local(config.url) or is_device(config.url) or config.loop:
        return None
    path = local_path(config.url)
    return path if path.is_file() else None


class AudioReader:
    """Copies the packets of a video file's first audio stream into containers.

    An error while reading ends only the audio, not the video, and is logged
    (``audio_not_recorded``).

    Args:
        path: the video file.
        source: the source's name, for the log.
    """

    def __init__(self, path: Path, source: str) -> None:
        self._source = source
        self._packets: Iterator[av.Packet[AudioStream]] = iter(())
        self._next: av.Packet[AudioStream] | None = None
        self._path = path
        self._container: InputContainer | None = None
        self._stream: AudioStream | None = None
        self._is_new = True

    def add_stream(
        self, output: OutputContainer, container_format: str, options: dict[str, str]
    ) -> AudioStream | None:
        """Add an audio stream to a container that contains no packets yet.

        Args:
            output: the container.
            container_format: the format of the container, the same for all containers.
            options: the options that it was opened with, the same for all containers.

        Returns:
            The stream; None if there is no audio, or it cannot be copied into such a container.
        """
        try:
            if self._is_new:
                self._is_new = False
                self._open(container_format, options)
            return None if self._stream is None else output.add_stream_from_template(self._stream)
        except (av.FFmpegError, OSError, ValueError) as error:
            self._abandon(error)
            return None

    def copy(
        self, output: OutputContainer, stream: AudioStream, begin_s: float, end_s: float
    ) -> None:
        """Copy the packets that begin before a time.

        Args:
            output: the container.
            stream: what ``add_stream`` returned for it.
            begin_s: the time in the source that is 0 in the container. Earlier packets are skipped.
            end_s: the time in the source before which packets are copied.

        Raises:
            OSError, av.FFmpegError: the container cannot be written.
        """
        while self._next is not None:
            packet = self._next
            if packet.pts is not None and packet.pts * packet.time_base >= end_s:
                return
            self._next = self._read()
            if packet.pts is None or packet.dts is None:
                continue
            offset = round(Fraction(begin_s) / packet.time_base)
            if min(packet.pts, packet.dts) < offset:
                continue
            packet.pts -= offset
            packet.dts -= offset
            packet.stream = stream
            output.mux(packet)

    def close(self) -> None:
        """Close the file."""
        self._next = None
        if self._container is not None:
            self._container.close()

    def _open(self, container_format: str, options: dict[str, str]) -> None:
        self._container = av.open(f"file:{self._path}", options=_OPTIONS)
        if self._container.streams.audio:
            self._try_copy(container_format, options)
            self._stream = self._container.streams.audio[0]
            self._packets = self._container.demux(self._stream)
            self._next = self._read()

    def _try_copy(self, container_format: str, options: dict[str, str]) -> None:
        """Copy some packets into memory: a container may reject a codec at its first packet.

        Raises:
            av.FFmpegError, ValueError: it cannot be copied.
        """
        with (
            av.open(f"file:{self._path}", options=_OPTIONS) as given,
            av.open(io.BytesIO(), "w", format=container_format, options=options) as output,
        ):
            stream = output.add_stream_from_template(given.streams.audio[0])
            for packet in islice(given.demux(given.streams.audio[0]), _TRIAL_PACKETS):
                if packet.dts is not None:
                    packet.stream = stream
                    output.mux(packet)

    def _read(self) -> av.Packet[AudioStream] | None:
        try:
            return next(self._packets, None)
        except (av.FFmpegError, OSError) as error:
            self._abandon(error)
            return None

    def _abandon(self, error: Exception) -> None:
        reason = getattr(error, "strerror", None) or str(error)
        _logger.warning("audio_not_recorded", extra=fields(source=self._source, reason=reason))
        self._stream = self._next = None
        self._packets = iter(())
