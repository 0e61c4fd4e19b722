"""Annotated video files."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.container import OutputContainer
from av.video.stream import VideoStream
from PIL import Image, ImageOps

from maskcast.engines.errors import InputError
from maskcast.engines.instances import Instances
from maskcast.pipeline.frame import Frame
from maskcast.pipeline.outputs.draw import Annotator
from maskcast.pipeline.outputs.recorder import Published

CLOCK_HZ = 90_000
"""Ticks a second of a recorded video's clock (that of RTP and MPEG): exact for every usual rate."""


class VideoRecorder:
    """Writes annotated H.264 video (MP4), with the source's own timing.

    The first source goes to ``path``; every further one to a file of its own beside it, its name
    with the source's added. The file is fragmented while it grows, so that it plays up to the
    last fragment if the process is killed, and becomes an ordinary MP4 file when it is closed.

    Args:
        path: the file; what it held before is gone.
        label_names: the model's names, indexed by label.

    Raises:
        InputError: the file cannot be written.
    """

    def __init__(self, path: Path, label_names: Sequence[str]) -> None:
        self._path = path
        self._label_names = label_names
        self._films: dict[str, _Film] = {}
        try:
            path.open("wb").close()  # so that a wrong path is known before the first frame
        except OSError as error:
            raise InputError(f"{path}: cannot be written: {error.strerror}") from None

    @property
    def paths(self) -> list[Path]:
        """The files written so far."""
        return [film.path for film in self._films.values()]

    def write(self, frame: Frame, instances: Instances, published: Published) -> None:
        """Append one annotated frame to its source's file."""
        film = self._films.get(frame.source)
        if film is None:
            path = self._path
            if self._films:
                path = path.with_stem(f"{path.stem}-{frame.source}")
            film = self._films[frame.source] = _Film(path, self._label_names)
        film.append(frame, instances)

    def close(self) -> None:
        """Finish the files; without a frame there is none."""
        for film in self._films.values():
            film.close()
        if not self._films and self._path.is_file():
            self._path.unlink()


class _Film:
    """One source's video file.

    The first picture decides the size. A picture of another size (a camera that was set anew) is
    scaled into it, with bars where its shape differs.
    """

    def __init__(self, path: Path, label_names: Sequence[str]) -> None:
        self.path = path
        self._painter = Annotator(label_names)
        self._container: OutputContainer | None = None
        self._stream: VideoStream | None = None
        self._clock = _Clock()

    def append(self, frame: Frame, instances: Instances) -> None:
        """Draw the instances into the frame's picture and encode it."""
        image = Image.fromarray(frame.picture.to_ndarray(format="rgb24"))
        image = image.rotate(frame.rotation, expand=True)
        self._painter.draw(image, instances)
        if self._stream is None:
            self._open(image.size)
        assert self._stream is not None
        size = (self._stream.width, self._stream.height)
        if image.size != size:
            one_pixel_off = abs(image.width - size[0]) <= 1 and abs(image.height - size[1]) <= 1
            image = image.crop((0, 0, *size)) if one_pixel_off else ImageOps.pad(image, size)
        picture = av.VideoFrame.from_ndarray(np.asarray(image), format="rgb24")
        picture.pts = self._clock.ticks(frame)
        picture.time_base = Fraction(1, CLOCK_HZ)
        self._mux(picture)

    def close(self) -> None:
        """Flush the encoder and write the index that makes the file an ordinary one."""
        if self._container is not None:
            self._mux(None)
            self._container.close()

    def _open(self, size: tuple[int, int]) -> None:
        options = {
            "movflags": "hybrid_fragmented+frag_keyframe+empty_moov+default_base_moof",
            "flush_packets": "1",
        }
        self._container = av.open(str(self.path), "w", format="mp4", options=options)
        self._stream = self._container.add_stream(
            # Without B-frames: their delay would move every time in a fragmented file.
            "libx264",
            rate=25,
            options={"preset": "veryfast", "crf": "21", "bf": "0"},
        )
        # Every other column and row of colour: H.264 4:2:0 wants even sides.
        self._stream.width, self._stream.height = (side + side % 2 for side in size)
        self._stream.pix_fmt = "yuv420p"
        self._stream.codec_context.time_base = Fraction(1, CLOCK_HZ)
        self._stream.codec_context.gop_size = 50  # a fragment ends with each group of pictures

    def _mux(self, picture: av.VideoFrame | None) -> None:
        assert self._container is not None
        assert self._stream is not None
        for packet in self._stream.encode(picture):
            self._container.mux(packet)


class _Clock:
    """Turns a source's times into the strictly rising ticks that a file needs."""

    def __init__(self) -> None:
        self._offset_s: float | None = None
        self._last = -1
        self._step = CLOCK_HZ // 25

    def ticks(self, frame: Frame) -> int:
        """Return the frame's time in the file, 0 for the first one.

        Where the source's clock jumps back or far ahead (a camera that came back, a clip that
        starts again), the file goes on with the last distance between two frames.
        """
        time_s = frame.pts_s if frame.pts_s is not None else frame.capture_ns / 1e9
        if self._offset_s is None:
            self._offset_s = time_s
        ticks = round((time_s - self._offset_s) * CLOCK_HZ)
        if self._last >= 0:
            if not self._last < ticks <= self._last + 60 * CLOCK_HZ:
                ticks = self._last + self._step
                self._offset_s = time_s - ticks / CLOCK_HZ
            self._step = ticks - self._last
        self._last = ticks
        return ticks
