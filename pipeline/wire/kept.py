"""Bounded storage per source, and the events that are kept for new subscribers."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from maskcast.pipeline.wire.message import EventHeader, Header, topic

MAX_SOURCES = 1024
"""Maximum number of sources, and of pairs of publisher and source, for which data is kept."""

MAX_FORMER = 8
"""Maximum number of former publishers that are remembered for a source."""

KEPT_EVENTS = {"labels": "labels", "size": "size", "state": "state", "ended": "state"}
"""Events that a new subscriber receives, and the slot in which each is kept."""

K = TypeVar("K")
V = TypeVar("V")


def keep(kept: OrderedDict[K, V], key: K, value: V, limit: int) -> None:
    """Store a value as the most recent one; drop the oldest of more than ``limit``."""
    kept[key] = value
    kept.move_to_end(key)
    if len(kept) > limit:
        kept.popitem(last=False)


@dataclass(slots=True)
class _Source:
    publisher: str
    former: deque[str] = field(default_factory=lambda: deque(maxlen=MAX_FORMER))
    events: dict[str, tuple[EventHeader, list[bytes]]] = field(default_factory=dict)

    @property
    def ended(self) -> bool:
        header, _ = self.events.get("state", (None, None))
        return header is not None and header.event == "ended"


class KeptEvents:
    """The last ``labels``, ``size`` and ``state`` of each source, from its newest publisher.

    Args:
        max_sources: maximum number of sources; the least recently updated one is dropped first.
    """

    def __init__(self, max_sources: int = MAX_SOURCES) -> None:
        self._max_sources = max_sources
        self._sources: OrderedDict[str, _Source] = OrderedDict()

    def add(self, source: str, header: Header, parts: Sequence[bytes]) -> None:
        """Keep a message if it is one of ``KEPT_EVENTS``.

        Events of removed sources and of former publishers are not kept.
        """
        if not isinstance(header, EventHeader) or not (slot := KEPT_EVENTS.get(header.event)):
            return
        known = self._sources.get(source) or _Source(header.publisher)
        if header.publisher in known.former:
            return
        if header.publisher != known.publisher:
            known.former.append(known.publisher)
            known.publisher = header.publisher
            known.events.clear()
        known.events[slot] = header, list(parts)
        if header.event == "ended" and header.data.get("reason") == "removed":
            known.events.clear()
        keep(self._sources, source, known, self._max_sources)

    def messages(self, prefixes: tuple[bytes, ...] = (b"",)) -> Iterator[list[bytes]]:
        """Yield the kept messages whose topics begin with one of the prefixes.

        Sources that have ended come last, so that a subscriber to all sources does not conclude
        that there are no others.
        """
        chosen = [
            source
            for name, source in self._sources.items()
            if topic(name, "event").startswith(prefixes)
        ]
        for source in sorted(chosen, key=lambda source: source.ended):
            for _, parts in source.events.values():
                yield parts

    def states(self) -> dict[str, str]:
        """Return the last known state of each source (``SourceState``)."""
        states = {}
        for name, source in self._sources.items():
            if (known := source.events.get("state")) is not None:
                header, _ = known
                states[name] = str(header.data.get("state", "")) if not source.ended else "ended"
        return states
