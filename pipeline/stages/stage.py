"""Stage: a thread that takes items from an inbox, works on them and passes the results on."""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from maskcast.pipeline.configuration.config import DecodeDevice
from maskcast.pipeline.frame import Frame
from maskcast.pipeline.inbox import Inbox, InboxClosed
from maskcast.pipeline.orders import Failed, Order, StageEnded
from maskcast.pipeline.stats import Meter

In = TypeVar("In")
Out = TypeVar("Out")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class PipelineContext:
    """State shared by all stages and decoders of a pipeline. Every member is thread-safe.

    Attributes:
        meter: counts frames and times stages.
        send: passes an order to the supervisor.
        reading: set when the sources may be read, because enough subscribers are connected or the
            pipeline is ending.
        is_ready: tells whether the engine is ready for frames of this shape; if not, the engine
            starts to prepare for them in the background.
        limit: the number of frames to read from each source; None for all.
        saves_video: whether annotated video is written; if so, missing audio is logged.
        decode_device: the device for sources with ``decode: auto``; None for software.
    """

    meter: Meter
    send: Callable[[Order], None]
    reading: threading.Event
    is_ready: Callable[[Frame], bool]
    limit: int | None = None
    saves_video: bool = False
    decode_device: DecodeDevice | None = None


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened to a source. It passes the stages in order with the frames.

    Attributes:
        source: the source's name.
        name: the event's name on the wire, for example ``state`` or ``ended`` (docs/wire.md).
        data: details, published with the event.
    """

    source: str
    name: str
    data: Mapping[str, str | int | float] = field(default_factory=dict)


class Outlet(Protocol[T]):
    """The input of a stage: one inbox, or several in turn."""

    def take(
        self,
        limit: int = 1,
        alike: Callable[[T, T], bool] | None = None,
        timeout_s: float | None = None,
    ) -> list[T]:
        """See ``Inbox.take``."""


class Stage(threading.Thread, ABC, Generic[In, Out]):
    """One thread of the pipeline. It owns the resources that its work needs.

    A stage takes an item only when the next inbox can hold the result. With the policy ``latest``,
    items are therefore as recent as possible when the next stage receives them.

    When its inbox is closed and empty, the stage closes the next inbox, so that the stages end one
    after another. A stage that fails leaves the next inbox open; the supervisor closes it.

    Args:
        name: name of the thread, and of the stage in timelines.
        inbox: where it takes items from.
        outbox: where it puts results; None for the last stage.
        context: shared with the other stages. An error is sent as ``Failed``, and the end of the
            thread as ``StageEnded``.
    """

    batch_size = 1
    """Maximum number of items per call to ``work``."""
    idle_timeout_s: float | None = None
    """Seconds without an item after which ``idle`` is called; None for never."""

    def __init__(
        self,
        name: str,
        inbox: Outlet[In | Event],
        outbox: Inbox[Out | Event] | None,
        context: PipelineContext,
    ) -> None:
        super().__init__(name=name, daemon=True)
        self._inbox = inbox
        self._outbox = outbox
        self._context = context
        self._work_since_ns: int | None = None

    @property
    def at_work_s(self) -> float | None:
        """Seconds since the current call of ``work`` began; None while waiting. Thread-safe."""
        since_ns = self._work_since_ns  # read once: another thread changes it
        return None if since_ns is None else (time.monotonic_ns() - since_ns) / 1e9

    def run(self) -> None:
        """Work until the inbox is closed and empty."""
        try:
            try:
                self.open()
                self._work_through()
            finally:
                self.close()
        except BaseException as error:
            # The next inbox stays open until the supervisor has ended every source with a reason.
            self._context.send(Failed(error))
        else:
            if self._outbox is not None:
                self._outbox.close()
        finally:
            self._context.send(StageEnded())

    def open(self) -> None:
        """Create the stage's resources, on its own thread."""

    @abstractmethod
    def work(self, items: list[In]) -> list[Out]:
        """Work on 1 to ``batch_size`` items; return the items for the next stage."""

    def alike(self, first: In, other: In) -> bool:
        """Tell whether two items may be in the same batch."""
        return True

    def event(self, event: Event) -> None:
        """Pass an event on."""
        if self._outbox is not None:
            self._outbox.post(event)

    def idle(self) -> None:
        """Do periodic work while no items arrive."""

    def close(self) -> None:
        """Free the stage's resources. Called on its own thread, also after an error."""

    def _work_through(self) -> None:
        while True:
            if self._outbox is not None:
                self._outbox.wait_for_capacity()
            try:
                taken = self._inbox.take(self.batch_size, self._alike, self.idle_timeout_s)
            except InboxClosed:
                return
            if not taken:
                self.idle()
            elif isinstance(taken[0], Event):
                self.event(taken[0])
            else:
                items = [item for item in taken if not isinstance(item, Event)]
                self._work_since_ns = time.monotonic_ns()
                results = self.work(items)
                self._work_since_ns = None
                if self._outbox is not None:
                    for result in results:
                        self._outbox.put(result)

    def _alike(self, first: In | Event, other: In | Event) -> bool:
        if isinstance(first, Event) or isinstance(other, Event):
            return False
        return self.alike(first, other)
