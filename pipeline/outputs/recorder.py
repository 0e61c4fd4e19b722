"""Recorder: the interface for writing published frames to an output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from maskcast.engines.instances.instances import Instances
from maskcast.pipeline.frame import Frame
from maskcast.pipeline.tracking.analysis import UNTRACKED, Analysis


@dataclass(frozen=True, slots=True)
class Published:
    """The result of publishing a frame.

    Attributes:
        seq: sequence number of the message, per publisher and source, from 0.
        publish_ns: when it was sent, UTC nanoseconds.
        dropped_before: number of frames of the source dropped since its last message.
        analysis: zones, lines and events after this frame.
    """

    seq: int
    publish_ns: int
    dropped_before: int
    analysis: Analysis = UNTRACKED


class Recorder(Protocol):
    """Writes published frames. All methods are called on the record stage's thread."""

    def write(self, frame: Frame, instances: Instances, published: Published) -> None:
        """Write one frame, of any source, after its message has been sent.

        Raises:
            OSError, av.FFmpegError: it cannot be written. Everything else continues, and the
                recorder is called again some seconds later.
        """

    def close(self) -> None:
        """Finish the output. Called once, also after a failure."""


@runtime_checkable
class SourceEnding(Protocol):
    """A recorder that finishes a source's file when the source ends."""

    def end_source(self, source: str) -> None:
        """Finish a source's file. The source's name may be used again later."""
