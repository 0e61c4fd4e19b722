"""Feed: one subscription, shared by all browsers, each with a mailbox of its own."""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter, OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import msgspec

from maskcast.pipeline.clients.view.packet import Packet
from maskcast.pipeline.subscriber.received import PublishedFrame, StreamEvent
from maskcast.pipeline.subscriber.subscription import Subscription
from maskcast.pipeline.wire.kept import MAX_SOURCES

MOST_IN_FLIGHT = 2
"""Frames of one source that a browser may have received and not drawn yet."""

SILENT_AFTER_S = 5.0
"""Without a message for this long, the page says that the publisher is silent."""

FORGET_AFTER_S = 10.0
"""When a connection was made again, sources that nothing is heard of are shown for this long."""

_POLL_S = 0.2

_DRAIN_S = 0.5
"""What has arrived before a connection broke is handed on for this long."""

_REMOVED = {"state": "ended", "reason": "removed"}

Item = Packet | str


class Mailbox:
    """What waits for one browser: the newest frame and the newest state of each source.

    A frame replaces an older one of its source. No more frames are handed out while the browser
    has not acknowledged those it has, so a slow one skips frames and sees no old ones.
    """

    def __init__(self) -> None:
        self._texts: dict[str, str] = {}
        self._packets: dict[str, Packet] = {}
        self._in_flight: Counter[str] = Counter()
        self._changed = asyncio.Event()

    def put_text(self, key: str, text: str) -> None:
        """Replace the text that waits under a key."""
        self._texts[key] = text
        self._changed.set()

    def put_packet(self, packet: Packet) -> None:
        """Replace the frame of the source that waits."""
        self._packets[packet.source] = packet
        self._changed.set()

    def discard(self, source: str) -> None:
        """Drop the frame of a source that waits."""
        self._packets.pop(source, None)

    def acknowledge(self, source: str) -> None:
        """Count a frame as drawn; names that nothing was sent of are ignored."""
        if self._in_flight[source] > 1:
            self._in_flight[source] -= 1
        else:
            del self._in_flight[source]
        self._changed.set()

    async def take(self) -> Item:
        """Wait for what the browser has room for: texts first, then frames in turn."""
        while True:
            if self._texts:
                return self._texts.pop(next(iter(self._texts)))
            for source in self._packets:
                if self._in_flight[source] < MOST_IN_FLIGHT:
                    self._in_flight[source] += 1
                    return self._packets.pop(source)
            self._changed.clear()
            await self._changed.wait()


@dataclass(slots=True)
class _Source:
    """What a browser that connects now needs to know of a source.

    ``publisher`` and ``seq`` are those of the last frame.
    """

    lost: int = 0
    publisher: str = ""
    seq: int = 0
    packet: Packet | None = None
    state: dict[str, Any] = field(default_factory=dict)


class Feed:
    """Receives from a publisher while there are browsers, and fills their mailboxes.

    Without browsers there is no subscription, so that the publisher encodes no images. There is
    another one after the connection has broken: the view's rights may have changed, so what is
    known is forgotten, and the publisher sends the states of the permitted sources again.

    Args:
        subscription: not open; with policy "latest" and events.

    Attributes:
        fault: why ``run`` ended by itself.
    """

    def __init__(self, subscription: Subscription[PublishedFrame | StreamEvent]) -> None:
        self._subscription = subscription
        self._sources: OrderedDict[str, _Source] = OrderedDict()
        self._mailboxes: set[Mailbox] = set()
        self._has_browsers = asyncio.Event()
        self._silent = False
        self.fault: Exception | None = None

    def __len__(self) -> int:
        """Return the number of browsers."""
        return len(self._mailboxes)

    @contextmanager
    def connect(self) -> Iterator[Mailbox]:
        """Add a browser for as long as the context lasts; its mailbox holds what is known."""
        mailbox = Mailbox()
        self._put_link(mailbox)
        for name, source in self._sources.items():
            if source.state:
                mailbox.put_text(name, _encode_state(name, source.state))
            if source.packet is not None:
                mailbox.put_packet(source.packet)
        self._mailboxes.add(mailbox)
        self._has_browsers.set()
        try:
            yield mailbox
        finally:
            self._mailboxes.discard(mailbox)
            if not self._mailboxes:
                self._has_browsers.clear()

    async def run(self) -> None:
        """Receive until cancelled, or until the subscription fails."""
        try:
            while True:
                await self._has_browsers.wait()
                async with self._subscription:
                    await self._receive()
                if self._mailboxes:
                    self._forget_contents()
                else:
                    self._sources.clear()
        except Exception as error:
            self.fault = error

    async def _receive(self) -> None:
        """Receive until no browser is left or the connection has broken."""
        heard_s = time.monotonic()
        drained_by_s: float | None = None
        forget_at_s: float | None = None
        while self._has_browsers.is_set():
            if drained_by_s is None and self._subscription.broken:
                drained_by_s = time.monotonic() + _DRAIN_S
            if forget_at_s is not None and time.monotonic() > forget_at_s:
                self._forget_unmentioned()
                forget_at_s = math.inf
            try:
                wait_s = _POLL_S if drained_by_s is None else 0
                item = await self._subscription.receive_async(wait_s)
            except TimeoutError:
                if drained_by_s is not None:
                    return
                self._set_silent(time.monotonic() - heard_s > SILENT_AFTER_S)
                continue
            if drained_by_s is not None and time.monotonic() > drained_by_s:
                return
            heard_s = time.monotonic()
            if forget_at_s is None:
                forget_at_s = heard_s + FORGET_AFTER_S
            self._set_silent(False)
            if isinstance(item, PublishedFrame):
                self._add_frame(item)
            elif item.name in ("state", "ended"):
                self._add_state(item)

    def _forget_contents(self) -> None:
        """Forget frames and states, but not what was lost."""
        for name, source in self._sources.items():
            source.packet, source.state = None, {}
            for mailbox in self._mailboxes:
                mailbox.discard(name)

    def _set_silent(self, silent: bool) -> None:
        if silent != self._silent:
            self._silent = silent
            for mailbox in self._mailboxes:
                self._put_link(mailbox)

    def _put_link(self, mailbox: Mailbox) -> None:
        text = msgspec.json.encode({"kind": "link", "silent": self._silent}).decode()
        mailbox.put_text("", text)  # no source has an empty name

    def _source(self, name: str) -> _Source:
        source = self._sources.setdefault(name, _Source())
        self._sources.move_to_end(name)
        if len(self._sources) > MAX_SOURCES:
            self._sources.popitem(last=False)
        return source

    def _add_frame(self, frame: PublishedFrame) -> None:
        source = self._source(frame.source)
        if frame.publisher == source.publisher:  # also what was lost between two subscriptions
            source.lost += frame.seq - source.seq - 1 - frame.skipped_before
        else:
            source.lost += frame.lost_before
        source.publisher, source.seq = frame.publisher, frame.seq
        source.packet = Packet(frame, source.lost)
        for mailbox in self._mailboxes:
            mailbox.put_packet(source.packet)

    def _add_state(self, event: StreamEvent) -> None:
        state = "ended" if event.name == "ended" else str(event.data.get("state", ""))
        shown = {"state": state, "reason": str(event.data.get("reason", ""))}
        if shown == _REMOVED:
            self._forget(event.source)
            return
        self._source(event.source).state = shown
        for mailbox in self._mailboxes:
            mailbox.put_text(event.source, _encode_state(event.source, shown))

    def _forget_unmentioned(self) -> None:
        """Forget the sources that the publisher had before it was restarted, and has no more."""
        for name, source in list(self._sources.items()):
            if source.packet is None and not source.state:
                self._forget(name)

    def _forget(self, name: str) -> None:
        self._sources.pop(name, None)
        for mailbox in self._mailboxes:
            mailbox.discard(name)
            mailbox.put_text(name, _encode_state(name, _REMOVED))


def _encode_state(source: str, state: dict[str, Any]) -> str:
    return msgspec.json.encode({"kind": "state", "source": source, **state}).decode()
