"""What is kept of each source: a bounded number of entries, and the events for a newcomer."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import TypeVar

from maskcast.pipeline.wire.message import EventHeader, Header

MAX_SOURCES = 1024
"""Sources, and pairs of publisher and source, that something is kept of: those heard of last."""

KEPT_EVENTS = {"labels": "labels", "size": "size", "state": "state", "ended": "state"}
"""Events that a new subscriber receives, and the slot that each is kept in."""

K = TypeVar("K")
V = TypeVar("V")


def keep(kept: OrderedDict[K, V], key: K, value: V, most: int) -> None:
    """Store a value as the most recent of at most ``most``; the oldest is dropped."""
    kept[key] = value
    kept.move_to_end(key)
    if len(kept) > most:
        kept.popitem(last=False)


class KeptEvents:
    """The events that a new subscriber, or a new file, begins with.

    These are the last ``labels``, ``size`` and ``state`` of at most ``MAX_SOURCES`` sources.
    """

    def __init__(self) -> None:
        self._sources: OrderedDict[str, dict[str, tuple[str, list[bytes]]]] = OrderedDict()

    def add(self, source: str, header: Header, parts: Sequence[bytes]) -> None:
        """Keep a message if it is one of these events."""
        if isinstance(header, EventHeader) and (slot := KEPT_EVENTS.get(header.event)):
            events = self._sources.get(source, {})
            events[slot] = header.event, list(parts)
            keep(self._sources, source, events, MAX_SOURCES)

    def messages(self, source: str | None = None) -> Iterator[list[bytes]]:
        """Yield the kept messages of a source, or of all; sources that have ended come last."""
        chosen = [
            events for name, events in self._sources.items() if source is None or name == source
        ]
        for events in sorted(chosen, key=lambda events: events.get("state", ("",))[0] == "ended"):
            for _, parts in events.values():
                yield parts
