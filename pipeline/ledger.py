"""Ledger: what arrived at a subscriber, what did not, and what the sources said last."""

from __future__ import annotations

from dataclasses import dataclass, field

from pipeline.wire import EventHeader, InstancesHeader


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
    event_seq: dict[str, int] = field(default_factory=dict)


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


class Ledger:
    """Keeps account of sequence numbers, label names and states. Pure: knows no socket, no clock.

    Attributes:
        tally: the counts so far.
    """

    def __init__(self) -> None:
        self.tally = Tally()
        self._streams: dict[tuple[str, str], _Stream] = {}
        self._sources: dict[str, _Source] = {}
        self._label_names: dict[str, tuple[str, ...]] = {}

    def enter_instances(self, source: str, header: InstancesHeader) -> Gap | None:
        """Enter an ``instances`` message; None where it came before."""
        stream = self._streams.setdefault((header.publisher, source), _Stream())
        if stream.next_seq is not None and header.seq < stream.next_seq:
            self.tally.duplicate += 1
            return None
        known = self._sources.setdefault(source, _Source())
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
        stream = self._streams.setdefault((header.publisher, source), _Stream())
        if header.seq <= stream.event_seq.get(header.event, -1):
            return None
        stream.event_seq[header.event] = header.seq
        known = self._sources.setdefault(source, _Source())
        lost = 0
        if stream.next_seq is not None and header.sent > stream.next_seq:
            lost = header.sent - stream.next_seq
            stream.next_seq = header.sent
            self.tally.lost += lost
        if header.event == "labels":
            names = header.data.get("names")
            if isinstance(names, list) and all(isinstance(name, str) for name in names):
                self._label_names[str(header.data.get("id"))] = tuple(names)
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
