"""Frame: one decoded video frame, and when each stage worked on it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import av
import numpy as np
from numpy.typing import NDArray

from maskcast.pipeline.wire.message import MAX_SIDE as MAX_SIDE

STAGES = ("decode", "preprocess", "infer", "masks", "publish")
"""The five stages, in the order in which a frame passes them."""

POSE = "pose"
"""The step of the ``masks`` stage that estimates poses, before the masks."""

STEPS = ("decode", "preprocess", "infer", POSE, "masks", "publish")
"""The steps that a timeline may contain, in this order, before a frame is recorded."""

Clock = Literal["receipt", "sender"]
"""Which clock a capture time was read from: this machine's, on receipt, or the camera's."""


@dataclass(slots=True)
class Timeline:
    """When each stage began and ended its work on a frame, nanoseconds of ``time.monotonic_ns``.

    The gap between the end of one stage and the start of the next is the time that the frame waited
    in the inbox of the next stage.
    """

    start_ns: dict[str, int] = field(default_factory=dict)
    end_ns: dict[str, int] = field(default_factory=dict)

    def begin(self, stage: str) -> None:
        """Record that a stage begins its work now."""
        self.start_ns[stage] = time.monotonic_ns()

    def end(self, stage: str) -> None:
        """Record that a stage ends its work now."""
        self.end_ns[stage] = time.monotonic_ns()


@dataclass(slots=True)
class Frame:
    """One decoded video frame.

    Attributes:
        source: the source's name.
        index: position in the source, counted from 0 as captured, dropped frames included.
        pts_s: presentation time in seconds from the stream's own clock; None if it has none. For a
            live source it starts at 0 and always increases, also over reconnects and clock jumps.
        capture_ns: when it was captured, UTC nanoseconds.
        decoded: the decoded image in the decoder's own pixel format, at most ``MAX_SIDE`` pixels
            wide and high.
        rotation: degrees counter-clockwise (0, 90, 180, 270) by which the image must be rotated to
            be upright, from the container's display matrix.
        timeline: when each stage worked on it.
        clock: which clock ``capture_ns`` was read from.
        skipped: number of frames of the source before this one that the configuration leaves out.
        file: the name of the file, for a frame from a folder or a single image.
        decoder: what decoded it: ``software``, ``cuda`` or ``vaapi``.
    """

    source: str
    index: int
    pts_s: float | None
    capture_ns: int
    decoded: av.VideoFrame
    rotation: int = 0
    timeline: Timeline = field(default_factory=Timeline)
    clock: Clock = "receipt"
    skipped: int = 0
    file: str | None = None
    decoder: str = "software"

    def image(self) -> NDArray[np.uint8]:
        """Return the frame's pixels, upright: uint8 RGB ``[height, width, 3]``."""
        pixels = self.decoded.to_ndarray(format="rgb24")
        return np.ascontiguousarray(np.rot90(pixels, self.rotation // 90))

    def restart_clock(self) -> None:
        """Shift the capture and the decoding so that the decoding ends now.

        For a frame that was held back on purpose: its wait is not part of its latency.
        """
        shift_ns = time.monotonic_ns() - self.timeline.end_ns["decode"]
        self.capture_ns += shift_ns
        self.timeline.start_ns["decode"] += shift_ns
        self.timeline.end_ns["decode"] += shift_ns


def begin_batch(frames: Sequence[Frame], stage: str) -> int:
    """Stamp the start of a stage's work on a batch; return it for ``end_batch``.

    The frames of a batch share one start and one end, which shows that they were one batch.
    """
    frames[0].timeline.begin(stage)
    return frames[0].timeline.start_ns[stage]


def end_batch(frames: Sequence[Frame], stage: str, begin_ns: int) -> None:
    """Stamp the end of a stage's work on a batch."""
    frames[0].timeline.end(stage)
    end_ns = frames[0].timeline.end_ns[stage]
    for frame in frames:
        frame.timeline.start_ns[stage] = begin_ns
        frame.timeline.end_ns[stage] = end_ns
