"""Stage: one thread that takes from an inbox, works, and hands on."""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from maskcast.pipeline.inbox import Inbox, InboxClosed

In = TypeVar("In")
Out = TypeVar("Out")
T = TypeVar("T")

Report = Callable[[BaseException | None], None]


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened to a source. It passes the stages in line with the frames.

    Attributes:
        source: the source's name.
        name: ``state`` or ``ended`` (docs/wire.md).
        data: what belongs to it; it goes out over the wire.
    """

    source: str
    name: str
    data: Mapping[str, str | int | float] = field(default_factory=dict)


class Outlet(Protocol[T]):
    """What a stage takes from: one inbox, or many in turn."""

    def take(
        self,
        limit: int = 1,
        alike: Callable[[T, T], bool] | None = None,
        timeout_s: float | None = None,
    ) -> list[T]:
        """As ``Inbox.take``."""


class Stage(threading.Thread, ABC, Generic[In, Out]):
    """One thread with a place in the line: it owns whatever its work needs.

    It takes an item only when there is room behind it: with the policy ``latest`` the item is then
    as young as it can be when the next stage gets it.

    When its inbox ends it closes the next one, so the end runs down the line behind the last item.
    A stage that fails leaves the next inbox open; whoever receives its report closes it.

    Args:
        name: the thread's name and the stage's in timelines.
        inbox: what it takes from.
        outbox: what it hands on to; None for the last stage.
        report: called with an error of its own, and with None when the stage is over.
    """

    batch_size = 1
    """The most items that ``work`` takes at once."""
    idle_timeout_s: float | None = None
    """``idle`` is called after so long without an item."""

    def __init__(
        self,
        name: str,
        inbox: Outlet[In | Event],
        outbox: Inbox[Out | Event] | None,
        report: Report,
    ) -> None:
        super().__init__(name=name, daemon=True)
        self._inbox = inbox
        self._outbox = outbox
        self._report = report
        self._work_since_ns: int | None = None

    @property
    def at_work_s(self) -> float | None:
        """How long it has been at what it is doing now; None while it waits. Ask any time."""
        since_ns = self._work_since_ns  # may change at any moment
        return None if since_ns is None else (time.monotonic_ns() - since_ns) / 1e9

    def run(self) -> None:
        """Work until the inbox ends."""
        try:
            try:
                self.open()
                self._work_through()
            finally:
                self.close()
        except BaseException as error:
            # The next inbox stays open: the supervisor closes it once every source has its reason.
            self._report(error)
        else:
            if self._outbox is not None:
                self._outbox.close()
        finally:
            self._report(None)

    def open(self) -> None:
        """Make, on the stage's own thread, what belongs to it."""

    @abstractmethod
    def work(self, items: list[In]) -> list[Out]:
        """Work on 1 to ``batch_size`` items; return what goes to the next stage."""

    def alike(self, first: In, other: In) -> bool:
        """Tell whether two items may be worked on at once."""
        return True

    def event(self, event: Event) -> None:
        """Pass an event on."""
        if self._outbox is not None:
            self._outbox.post(event)

    def idle(self) -> None:
        """Do what must be done now and then while nothing comes."""

    def close(self) -> None:
        """Free what ``open`` made. Called on the stage's own thread, also after a failure."""

    def _work_through(self) -> None:
        while True:
            if self._outbox is not None:
                self._outbox.wait_for_room()
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
