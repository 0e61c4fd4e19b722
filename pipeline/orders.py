"""Orders: what stages, decoders and callers tell the pipeline's supervisor."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Stop:
    """End the run: publish what the engine has begun, drop what waits before it.

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
    """A source has ended or cannot be reached: check whether there is a reason to go on."""


Order = Stop | Failed | StageEnded | SourceRemoved | Review
