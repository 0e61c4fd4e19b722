"""VideoRecorder: writes annotated video files."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.audio.stream import AudioStream
from av.container import OutputContainer
from av.video.stream import VideoStream
from PIL import Image, ImageOps

from maskcast.engines.errors import InputError
from maskcast.engines.instances.instances import Instances
from maskcast.engines.instances.keypoints import Keypoints
from maskcast.pipeline.configuration.config import VIDEO_SUFFIXES
from maskcast.pipeline.frame import Frame
from maskcast.pipeline.outputs.audio import AudioReader
from maskcast.pipeline.outputs.draw import Annotator
from maskcast.pipeline.outputs.files import (
    FileNames,
    PendingFile,
    check_label_names,
    check_path,
    check_writable,
)
from maskcast.pipeline.outputs.recorder import Published
from maskcast.pipeline.outputs.regions import draw_regions
from maskcast.pipeline.outputs.trails import Trails

CLOCK_HZ = 90_000
"""Ticks per second of a video's clock, as in RTP and MPEG; exact for all common frame rates."""

DEFAULT_FPS = 25
"""Frames per second of a video that is recorded from frames without times."""


class VideoRecorder:
    """Writes H.264 video with the instances drawn in, and with the source's own timing.

    Each source has its own file (see ``FileNames``). An MP4 file is fragmented while it grows, so
    that it plays up to the last fragment if the process is killed, and becomes an ordinary MP4 file
    when it is closed. A file gets its final name when its first fragment is on disk. The audio of a
    video file is copied without decoding if the file's type supports it.

    Args:
        path: the file, ``.mp4`` or ``.mkv``; may contain ``strftime`` directives.
        label_names: the model's class names, indexed by label.
        sources: the names of the run's sources, in their order; if empty, the first source that
            delivers a frame is the first one.
        segment_s: begin a new file after this many seconds of video.
        segment_bytes: begin a new file when this many bytes are reached, after up to one more
            fragment (50 frames).
        trail_s: draw the paths of tracked objects for this many seconds; None draws no paths.
        audio_of: returns the video file from which to copy a source's audio; None for no audio.
        keypoints: the model's keypoints; None draws no skeletons.

    Raises:
        InputError: the file cannot be written, or has another suffix.
        TypeError: an argument has the wrong type.
    """

    name = "save"

    def __init__(
        self,
        path: str | os.PathLike[str],
        label_names: Sequence[str],
        *,
        sources: Sequence[str] = (),
        segment_s: float | None = None,
        segment_bytes: float | None = None,
        trail_s: float | None = None,
        audio_of: Callable[[str], Path | None] | None = None,
        keypoints: Keypoints | None = None,
    ) -> None:
        checked = check_path(path)
        if checked.suffix.lower() not in VIDEO_SUFFIXES:
            known = " or ".join(VIDEO_SUFFIXES)
            raise InputError(f"{checked}: not a type of video that can be written; use {known}")
        check_writable(checked)
        self._label_names = check_label_names(label_names)
        self._segment_s = math.inf if segment_s is None else segment_s
        self._segment_bytes = math.inf if segment_bytes is None else segment_bytes
        segmented = segment_s is not None or segment_bytes is not None
        self._names = FileNames(checked, sources, segmented=segmented)
        self._files: dict[str, _VideoFile] = {}
        self._annotators: dict[str, Annotator] = {}
        self._audio_of = audio_of
        self._audio: dict[str, AudioReader] = {}
        self._trail_s = trail_s
        self._keypoints = keypoints
        self._trails: dict[str, Trails] = {}

    def write(self, frame: Frame, instances: Instances, published: Published) -> None:
        """Append one annotated frame to its source's file.

        Raises:
            OSError, av.FFmpegError: it cannot be written. The file is finished with the frames so
                far; the next frame begins a new file.
        """
        source = frame.source
        image = Image.fromarray(frame.image())
        annotator = self._annotators.get(source)
        if annotator is None:
            annotator = self._annotators[source] = Annotator(self._label_names, self._keypoints)
        draw_regions(image, published.analysis)
        if self._trail_s is not None:
            trails = self._trails.setdefault(source, Trails(self._trail_s))
            trails.draw(
                image, instances, frame.capture_ns / 1e9 if frame.pts_s is None else frame.pts_s
            )
        annotator.draw(image, instances)
        try:
            file = self._files.get(source)
            if file is not None and (
                file.duration_s >= self._segment_s or file.size >= self._segment_bytes
            ):
                del self._files[source]
                file.close()
                file = None
            if file is None:
                pending = self._names.next(source, frame.capture_ns)
                audio = self._audio_reader(source)
                file = self._files[source] = _VideoFile(pending, image.size, audio)
            file.append(image, frame)
        except (OSError, av.FFmpegError):
            if (broken := self._files.pop(source, None)) is not None:
                broken.abandon()
            raise

    def end_source(self, source: str) -> None:
        """Finish a source's file.

        Raises:
            OSError, av.FFmpegError: it could not be finished.
        """
        self._annotators.pop(source, None)
        self._trails.pop(source, None)
        with ExitStack() as closing:
            if (audio := self._audio.pop(source, None)) is not None:
                closing.callback(audio.close)
            if (file := self._files.pop(source, None)) is not None:
                closing.callback(file.close)

    def close(self) -> None:
        """Finish all files.

        Raises:
            OSError, av.FFmpegError: a file could not be finished; the others are finished.
        """
        with ExitStack() as closing:
            for source in list(self._files | self._audio):
                closing.callback(self.end_source, source)

    def _audio_reader(self, source: str) -> AudioReader | None:
        """Return the reader of a source's audio, which continues across segments."""
        path = self._audio_of(source) if self._audio_of is not None else None
        if source not in self._audio and path is not None:
            self._audio[source] = AudioReader(path, source)
        return self._audio.get(source)


class _VideoFile:
    """One video file.

    The first frame determines the size. A frame of another size (a camera with new settings) is
    scaled to fit, with bars if its aspect ratio differs. H.264 with 4:2:0 colour requires even
    sides: the last column or row of an odd side is repeated.
    """

    def __init__(
        self, pending: PendingFile, size: tuple[int, int], audio: AudioReader | None
    ) -> None:
        pending.probe()  # the encoder writes nothing yet, so a full disk would be noticed late
        self._pending = pending
        self._clock = _Clock()
        self._header_bytes = 0
        is_mp4 = pending.name.suffix.lower() == ".mp4"
        # Audio may end before the video: do not hold back frames while waiting for audio.
        options = {"flush_packets": "1", "max_interleave_delta": "2000000"}
        if is_mp4:
            options["movflags"] = "hybrid_fragmented+frag_keyframe+delay_moov+default_base_moof"
        container_format = "mp4" if is_mp4 else "matroska"
        self._container: OutputContainer = av.open(
            str(pending.path), "w", format=container_format, options=options
        )
        self._stream: VideoStream = self._container.add_stream(
            # No B-frames: their delay would shift all times in a fragmented file.
            "libx264",
            rate=None,
            options={"preset": "veryfast", "crf": "23", "bf": "0"},
        )
        self._stream.width, self._stream.height = (side + side % 2 for side in size)
        self._stream.pix_fmt = "yuv420p"
        self._stream.codec_context.time_base = Fraction(1, CLOCK_HZ)
        self._stream.codec_context.gop_size = 50  # a fragment ends before each key frame
        self._audio = audio
        self._audio_stream: AudioStream | None = None
        if audio is not None:
            self._audio_stream = audio.add_stream(self._container, container_format, options)

    @property
    def duration_s(self) -> float:
        """Seconds from the first frame to the end of the last one."""
        return self._clock.next_ticks / CLOCK_HZ

    @property
    def size(self) -> int:
        """Bytes on disk; PyAV creates the file with the first packet.

        Raises:
            FileNotFoundError: the file was deleted.
        """
        return self._pending.path.stat().st_size if self._header_bytes else 0

    def append(self, image: Image.Image, frame: Frame) -> None:
        """Encode an RGB image with the time of its frame."""
        size = (self._stream.width, self._stream.height)
        missing = (size[0] - image.width, size[1] - image.height)
        if missing not in ((0, 0), (0, 1), (1, 0), (1, 1)):
            image, missing = ImageOps.pad(image, size), (0, 0)
        pixels = np.asarray(image)
        if any(missing):
            pixels = np.pad(pixels, ((0, missing[1]), (0, missing[0]), (0, 0)), mode="edge")
        encoded = av.VideoFrame.from_ndarray(pixels, format="rgb24")
        encoded.pts = self._clock.ticks(frame)
        encoded.time_base = Fraction(1, CLOCK_HZ)
        self._mux(encoded)
        self._copy_audio()

    def close(self) -> None:
        """Flush the encoder, and write the index that makes the file an ordinary one."""
        try:
            self._mux(None)
            self._copy_audio()
            self._container.close()
            if not self._pending.is_kept:
                self._pending.keep()
        except BaseException:
            self.abandon()
            raise

    def abandon(self) -> None:
        """Close the file as it is, after an error."""
        with suppress(OSError, av.FFmpegError):
            self._container.close()
        self._pending.discard()

    def _copy_audio(self) -> None:
        """Copy the audio up to the time of the next frame."""
        if self._audio is not None and self._audio_stream is not None:
            begin_s = self._clock.begin_s
            end_s = begin_s + self.duration_s
            self._audio.copy(self._container, self._audio_stream, begin_s, end_s)

    def _mux(self, frame: av.VideoFrame | None) -> None:
        for packet in self._stream.encode(frame):
            self._container.mux(packet)
            if not self._header_bytes:
                self._header_bytes = self._pending.path.stat().st_size
        if not self._pending.is_kept and self.size > self._header_bytes:
            self._pending.keep()  # frames are on disk now


class _Clock:
    """Converts a source's times to the strictly increasing ticks that a file requires."""

    def __init__(self) -> None:
        self._offset_s: float | None = None
        self._last = -1
        self._step = CLOCK_HZ // DEFAULT_FPS

    @property
    def begin_s(self) -> float:
        """The time in the source that is 0 in the file."""
        return self._offset_s or 0.0

    @property
    def next_ticks(self) -> int:
        """Ticks at which the next frame is expected."""
        return 0 if self._last < 0 else self._last + self._step

    def ticks(self, frame: Frame) -> int:
        """Return the frame's time in the file, in ticks, 0 for the first frame.

        Frames without times follow one another at ``DEFAULT_FPS``. If the source's clock jumps back
        or far ahead (a camera that reconnects, a clip that restarts), the file continues with the
        last interval between two frames.
        """
        if frame.pts_s is None:
            self._last = self.next_ticks
            return self._last
        if self._offset_s is None:
            self._offset_s = frame.pts_s
        ticks = round((frame.pts_s - self._offset_s) * CLOCK_HZ)
        if self._last >= 0:
            if not self._last < ticks <= self._last + 60 * CLOCK_HZ:
                ticks = self._last + self._step
                self._offset_s = frame.pts_s - ticks / CLOCK_HZ
            self._step = ticks - self._last
        self._last = ticks
        return ticks
