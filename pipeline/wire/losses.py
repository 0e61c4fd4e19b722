"""LossTracker: what arrived at a subscriber, what did not, and what the sources said last."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from maskcast.pipeline.wire.message import EventHeader, InstancesHeader

MOST_SOURCES = 1024
"""So many sources, and as many streams, are kept account of: those that were heard last."""

MOST_EVENTS = 64
"""Likewise names of events of one stream."""

MOST_TABLES = 64
"""Likewise tables of label names."""

K = TypeVar("K")
V = TypeVar("V")


@dataclass(slots=True)
class Tally:
    """How messages fared, counted since the subscription began.

    Attributes:
        received: well-formed ``instances`` messages.
        lost: messages that the sequence numbers show were sent and did not arrive.
        skipped: messages that arrived and gave way to a newer one before they were asked for.
        duplicate: messages that arrived twice, for instance over two endpoints.
        malformed: messages that could not be read.
    """

    received: int = 0
    lost: int = 0
    skipped: int = 0
    duplicate: int = 0
    malformed: int = 0


@dataclass(slots=True)
class _Stream:
    """One publisher's messages of one source."""

    next_seq: int | None = None
    event_seq: OrderedDict[str, int] = field(default_factory=OrderedDict)


@dataclass(slots=True)
class _Source:
    publisher: str = ""
    ended: bool = False
    state: str = ""


@dataclass(frozen=True, slots=True)
class Gap:
    """What lies between a message and the one before it."""

    lost: int
    restarted: bool


class LossTracker:
    """Keeps account of sequence numbers, label names and states. Pure: knows no socket, no clock.

    However many sources, publishers, events and tables a publisher invents, its memory is bounded:
    what was not heard for longest is forgotten, and if it comes again it is as if it were new.

    Attributes:
        tally: the counts so far.
    """

    def __init__(self) -> None:
        self.tally = Tally()
        self._streams: OrderedDict[tuple[str, str], _Stream] = OrderedDict()
        self._sources: OrderedDict[str, _Source] = OrderedDict()
        self._label_names: OrderedDict[str, tuple[str, ...]] = OrderedDict()

    def enter_instances(self, source: str, header: InstancesHeader) -> Gap | None:
        """Enter an ``instances`` message; None where it came before."""
        stream = _recall(self._streams, (header.publisher, source), _Stream, MOST_SOURCES)
        if stream.next_seq is not None and header.seq < stream.next_seq:
            self.tally.duplicate += 1
            return None
        known = _recall(self._sources, source, _Source, MOST_SOURCES)
        # A publisher that is heard for the first time began before us: nothing of it is lost.
        first = stream.next_seq is None
        restarted = first and known.publisher not in ("", header.publisher)
        lost = 0 if stream.next_seq is None else header.seq - stream.next_seq
        stream.next_seq = header.seq + 1
        known.publisher, known.ended = header.publisher, False
        self.tally.received += 1
        self.tally.lost += lost
        return Gap(lost, restarted)

    def enter_event(self, source: str, header: EventHeader) -> Gap | None:
        """Enter an ``event`` message; None where it came before."""
        stream = _recall(self._streams, (header.publisher, source), _Stream, MOST_SOURCES)
        if header.seq <= stream.event_seq.get(header.event, -1):
            return None
        _keep(stream.event_seq, header.event, header.seq, MOST_EVENTS)
        known = _recall(self._sources, source, _Source, MOST_SOURCES)
        lost = 0
        if stream.next_seq is not None and header.sent > stream.next_seq:
            lost = header.sent - stream.next_seq
            stream.next_seq = header.sent
            self.tally.lost += lost
        if header.event == "labels":
            names = header.data.get("names")
            if isinstance(names, list) and all(isinstance(name, str) for name in names):
                table = str(header.data.get("id"))
                _keep(self._label_names, table, tuple(names), MOST_TABLES)
        elif header.event == "ended":
            known.ended, known.state = True, "ended"
        elif header.event == "state":
            known.ended, known.state = False, str(header.data.get("state", ""))
        return Gap(lost, restarted=False)

    def label_names(self, labels: str) -> tuple[str, ...]:
        """Return the table that a header names; empty where it was not heard."""
        return self._label_names.get(labels, ())

    def all_ended(self, sources: tuple[str, ...] | None) -> bool:
        """Whether each of the sources has ended; given None, each that was ever heard of."""
        names = sources or tuple(self._sources)
        return bool(names) and all(
            name in self._sources and self._sources[name].ended for name in names
        )

    def states(self) -> dict[str, str]:
        """Return what each source said last of its state."""
        return {name: source.state for name, source in self._sources.items() if source.state}


def _recall(kept: OrderedDict[K, V], key: K, make: Callable[[], V], most: int) -> V:
    """Return what is kept under a key, made if there is nothing, as the last heard of ``most``."""
    value = kept[key] if key in kept else make()
    _keep(kept, key, value, most)
    return value


def _keep(kept: OrderedDict[K, V], key: K, value: V, most: int) -> None:
    """Keep a value as the last heard of ``most``."""
    kept[key] = value
    kept.move_to_end(key)
    if len(kept) > most:
        kept.popitem(last=False)
