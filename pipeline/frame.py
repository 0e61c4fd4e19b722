"""Frame: one decoded picture and its way through the stages."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Literal

import av

STAGES = ("decode", "preprocess", "infer", "masks", "publish")
"""The five stages, in the order that a frame passes them."""


Clock = Literal["receipt", "sender"]
"""Whose time a capture is stamped in: the host's that received the picture, or the camera's."""


@dataclass(slots=True)
class Timeline:
    """When each stage began and ended its work on a frame, nanoseconds of ``time.monotonic_ns``.

    The gap between the end of one stage and the start of the next is time spent waiting in the
    next stage's inbox.
    """

    start_ns: dict[str, int] = field(default_factory=dict)
    end_ns: dict[str, int] = field(default_factory=dict)

    def begin(self, stage: str) -> None:
        """Stamp the start of a stage's work."""
        self.start_ns[stage] = time.monotonic_ns()

    def end(self, stage: str) -> None:
        """Stamp the end of a stage's work."""
        self.end_ns[stage] = time.monotonic_ns()


@dataclass(slots=True)
class Frame:
    """One decoded picture.

    Attributes:
        source: the source's name.
        index: which picture of the source this is, counted from 0 as captured, drops included.
        pts_s: presentation time in seconds from the stream's own clock; None where it has none.
            A live source's begins at 0 and rises, also over reconnects and jumps of that clock.
        capture_ns: when it was captured, UTC nanoseconds.
        picture: the decoded picture in the decoder's own pixel format.
        rotation: degrees counter-clockwise that the picture must be turned to stand upright
            (0, 90, 180, 270), from the container's display matrix.
        timeline: when each stage worked on it.
        clock: whose time ``capture_ns`` is.
    """

    source: str
    index: int
    pts_s: float | None
    capture_ns: int
    picture: av.VideoFrame
    rotation: int = 0
    timeline: Timeline = field(default_factory=Timeline)
    clock: Clock = "receipt"
