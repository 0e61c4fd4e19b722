"""LossTracker: counts lost and duplicate messages, and keeps label names and source states."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from maskcast.pipeline.wire.kept import MAX_SOURCES, keep
from maskcast.pipeline.wire.message import EventHeader, InstancesHeader

MAX_EVENTS = 64
"""Maximum number of event names tracked per stream."""

MAX_TABLES = 64
"""Maximum number of tables of label names."""

K = TypeVar("K")
V = TypeVar("V")


@dataclass(slots=True)
class Tally:
    """Message counts since the subscription was opened.

    Attributes:
        received: well-formed ``instances`` messages.
        lost: messages that never arrived, according to the sequence numbers.
        skipped: messages that were replaced by newer ones before they were returned.
        duplicate: messages that arrived twice, for example over two endpoints.
        malformed: messages that could not be read, or were too long.
    """

    received: int = 0
    lost: int = 0
    skipped: int = 0
    duplicate: int = 0
    malformed: int = 0


@dataclass(slots=True)
class _Stream:
    """The sequence numbers of one publisher's messages of one source."""

    next_seq: int | None = None
    event_seq: OrderedDict[str, int] = field(default_factory=OrderedDict)


@dataclass(slots=True)
class _Source:
    """A source as its newest publisher describes it; it may have moved from another publisher.

    Attributes:
        publisher: the publisher of the last ``instances`` message.
        newest: the publisher that was first heard most recently.
        ended: whether the source has ended, according to its newest publisher.
        state: its state, according to its newest publisher.
    """

    publisher: str = ""
    newest: str = ""
    ended: bool = False
    state: str = ""


@dataclass(frozen=True, slots=True)
class SequenceGap:
    """What happened between a message and the previous one.

    Attributes:
        lost: messages that never arrived.
        restarted: whether the publisher was restarted.
    """

    lost: int
    restarted: bool

    def __add__(self, other: SequenceGap) -> SequenceGap:
        return SequenceGap(self.lost + other.lost, self.restarted or other.restarted)


class LossTracker:
    """Tracks sequence numbers, label names and source states. Uses no socket and no clock.

    Its memory is bounded: the entries that were updated least recently are forgotten, and are
    treated as new if they return.

    Args:
        max_sources: maximum number of sources, and of pairs of publisher and source.

    Attributes:
        tally: the counts so far.
    """

    def __init__(self, max_sources: int = MAX_SOURCES) -> None:
        self.tally = Tally()
        self._max_sources = max_sources
        self._streams: OrderedDict[tuple[str, str], _Stream] = OrderedDict()
        self._sources: OrderedDict[str, _Source] = OrderedDict()
        self._label_names: OrderedDict[str, tuple[str, ...]] = OrderedDict()

    def add_instances(self, source: str, header: InstancesHeader) -> SequenceGap | None:
        """Count an ``instances`` message; return the gap before it, None for a duplicate."""
        stream, known = self._touch(header.publisher, source)
        if stream.next_seq is not None and header.seq < stream.next_seq:
            self.tally.duplicate += 1
            return None
        # Messages before the first one that arrived are not counted as lost.
        first = stream.next_seq is None
        restarted = first and known.publisher not in ("", header.publisher)
        lost = 0 if stream.next_seq is None else header.seq - stream.next_seq
        stream.next_seq = header.seq + 1
        known.publisher = header.publisher
        if header.publisher == known.newest:
            known.ended = False
        self.tally.received += 1
        self.tally.lost += lost
        return SequenceGap(lost, restarted)

    def add_event(self, source: str, header: EventHeader) -> SequenceGap | None:
        """Count an ``event`` message; return the gap before it, None for a duplicate."""
        stream, known = self._touch(header.publisher, source)
        if header.seq <= stream.event_seq.get(header.event, -1):
            return None
        keep(stream.event_seq, header.event, header.seq, MAX_EVENTS)
        lost = 0
        if stream.next_seq is not None and header.sent > stream.next_seq:
            lost = header.sent - stream.next_seq
            stream.next_seq = header.sent
            self.tally.lost += lost
        if header.event == "labels":
            names = header.data.get("names")
            if isinstance(names, list) and all(isinstance(name, str) for name in names):
                table = str(header.data.get("id"))
                keep(self._label_names, table, tuple(names), MAX_TABLES)
        elif header.publisher != known.newest:
            pass  # the source has moved to another publisher
        elif header.event == "ended":
            known.ended, known.state = True, "ended"
        elif header.event == "state":
            known.ended, known.state = False, str(header.data.get("state", ""))
        return SequenceGap(lost, restarted=False)

    def _touch(self, publisher: str, source: str) -> tuple[_Stream, _Source]:
        """Return a publisher's stream and the source, and mark both as most recently used."""
        is_new = (publisher, source) not in self._streams
        stream = _get(self._streams, (publisher, source), _Stream, self._max_sources)
        known = _get(self._sources, source, _Source, self._max_sources)
        if is_new or not known.newest:
            known.newest = publisher
        return stream, known

    def restart(self, source: str, publisher: str) -> None:
        """Count nothing as lost before a publisher's next ``instances`` message of a source."""
        if (stream := self._streams.get((publisher, source))) is not None:
            stream.next_seq = None

    def publishers(self) -> list[tuple[str, str]]:
        """Return all known pairs of publisher and source."""
        return list(self._streams)

    def label_names(self, labels: str) -> tuple[str, ...]:
        """Return the label names of the table with id ``labels``; empty if it has not arrived."""
        return self._label_names.get(labels, ())

    def all_ended(self, sources: tuple[str, ...] | None) -> bool:
        """Return whether all of the sources have ended; None means all known sources."""
        names = sources or tuple(self._sources)
        return bool(names) and all(
            name in self._sources and self._sources[name].ended for name in names
        )

    def states(self) -> dict[str, str]:
        """Return the last known state of each source."""
        return {name: source.state for name, source in self._sources.items() if source.state}


def _get(kept: OrderedDict[K, V], key: K, make: Callable[[], V], limit: int) -> V:
    """Return the value of a key, created if absent, and mark it as most recently used."""
    value = kept[key] if key in kept else make()
    keep(kept, key, value, limit)
    return value
