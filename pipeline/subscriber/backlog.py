"""Backlog: messages that a subscriber has received but not returned yet."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from maskcast.pipeline.subscriber.losses import LossTracker, SequenceGap
from maskcast.pipeline.subscriber.received import StreamEvent
from maskcast.pipeline.wire.kept import MAX_SOURCES, keep
from maskcast.pipeline.wire.message import (
    EventHeader,
    InstancesHeader,
    WireError,
    decode_header,
)

Policy = Literal["latest", "all"]

_NO_GAP = SequenceGap(0, restarted=False)


@dataclass(frozen=True, slots=True)
class Arrival:
    """An ``instances`` message in the backlog. Its arrays are decoded when it is returned.

    Attributes:
        source: the source's name.
        header: the decoded part 1.
        parts: all parts of the message.
        received_ns: when it arrived, UTC nanoseconds.
        gap: what was lost since the previous message in the backlog.
        skipped: number of older messages that this one has replaced.
    """

    source: str
    header: InstancesHeader
    parts: list[bytes]
    received_ns: int
    gap: SequenceGap
    skipped: int = 0


class Backlog:
    """Counts messages and queues them between two threads.

    With the policy "latest", a message replaces a queued message of the same source.

    Args:
        policy: "latest" or "all".
        events: also queue events.
        high_water_mark: maximum number of queued items; ``add`` waits while the queue is full.

    Attributes:
        changed: a condition whose lock guards all other attributes; notified of every change.
        losses: counts, label names and states.
        notify: called after every addition, to wake an event loop; None if there is none.
        closed: if set, ``add`` no longer waits.
        finished: if set, nothing more is added.
    """

    def __init__(self, policy: Policy, *, events: bool, high_water_mark: int) -> None:
        self.changed = threading.Condition()
        self.losses = LossTracker()
        self.notify: Callable[[], object] | None = None
        self.closed = False
        self.finished = False
        self._policy = policy
        self._events = events
        self._high_water_mark = high_water_mark
        self._queue: dict[object, Arrival | StreamEvent] = {}  # oldest first
        # Gaps that do not belong to a queued frame; the next frame of the source reports them.
        self._pending_gaps: OrderedDict[str, SequenceGap] = OrderedDict()

    @property
    def has_items(self) -> bool:
        """Whether something is queued. The caller holds the lock."""
        return bool(self._queue)

    def take(self) -> Arrival | StreamEvent | None:
        """Remove and return the oldest item; None if there is none. The caller holds the lock."""
        if not self._queue:
            return None
        item = self._queue.pop(next(iter(self._queue)))
        self.changed.notify_all()  # ``add`` may be waiting for space
        return item

    def add(self, parts: list[bytes], received_ns: int) -> None:
        """Count a message and append it to the queue. The caller holds the lock."""
        try:
            source, header = decode_header(parts)
        except WireError:
            self.losses.tally.malformed += 1
            return
        if isinstance(header, EventHeader):
            if (gap := self.losses.add_event(source, header)) is None:
                return
            self.carry_over(source, gap)
            if self._events:
                event = StreamEvent(
                    source,
                    header.publisher,
                    header.event,
                    header.data,
                    header.publish_ns,
                    received_ns,
                )
                self._enqueue((source, header.event), event)
            self.wake()
        elif (gap := self.losses.add_instances(source, header)) is not None:
            gap += self._pending_gaps.pop(source, _NO_GAP)
            self._enqueue((source, None), Arrival(source, header, parts, received_ns, gap))
            self.wake()

    def _enqueue(self, key: object, item: Arrival | StreamEvent) -> None:
        """Append an item; with the policy "latest", replace an older item with the same key."""
        if self._policy == "all":
            key = object()
        while (
            key not in self._queue and len(self._queue) >= self._high_water_mark and not self.closed
        ):
            self.changed.wait()
        if isinstance(item, Arrival) and isinstance(older := self._queue.get(key), Arrival):
            self.losses.tally.skipped += 1
            item = replace(item, gap=item.gap + older.gap, skipped=older.skipped + 1)
        self._queue[key] = item

    def carry_over(self, source: str, gap: SequenceGap) -> None:
        """Keep a gap for the next frame of the source."""
        gap += self._pending_gaps.get(source, _NO_GAP)
        if gap != _NO_GAP:
            keep(self._pending_gaps, source, gap, MAX_SOURCES)

    def wake(self) -> None:
        """Wake both threads. The caller holds the lock."""
        self.changed.notify_all()
        if self.notify is not None:
            self.notify()
