"""Orders: what stages, decoders and callers send to the pipeline's supervisor."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Stop:
    """End the run: publish the frames that the engine has begun, drop those that wait for it.

    Attributes:
        reason: the reason with which the sources end.
    """

    reason: str = "stopped"


@dataclass(frozen=True, slots=True)
class Failed:
    """End the run because of an error; ``Pipeline.join`` raises the first one.

    Attributes:
        error: the error, with its traceback.
    """

    error: BaseException


@dataclass(frozen=True, slots=True)
class StageEnded:
    """A stage's thread is about to return. Every stage sends this once."""


@dataclass(frozen=True, slots=True)
class SourceRemoved:
    """The last message of a removed source is published.

    Attributes:
        name: the source's name.
    """

    name: str


@dataclass(frozen=True, slots=True)
class Review:
    """A source has ended or cannot be reached: check whether the run should continue."""


Order = Stop | Failed | StageEnded | SourceRemoved | Review
