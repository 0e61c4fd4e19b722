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

MAX_IN_FLIGHT = 2
"""Maximum number of frames of one source that a browser has received but not drawn."""

SILENT_AFTER_S = 5.0
"""Without a message for this long, the page says that the publisher is silent."""

FORGET_AFTER_S = 10.0
"""After a reconnection, sources without a new message are removed after this many seconds."""

_POLL_S = 0.2

_DRAIN_S = 0.5
"""After a connection has broken, messages that had arrived are forwarded for this long."""

_REMOVED = {"state": "ended", "reason": "removed"}

Item = Packet | str


class Mailbox:
    """The items that wait for one browser: the newest frame and the newest state of each source.

    A frame replaces an older frame of its source. A browser must acknowledge frames to receive
    more, so a slow browser skips frames and shows no old ones.
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
        """Replace the waiting frame of the packet's source."""
        self._packets[packet.source] = packet
        self._changed.set()

    def discard(self, source: str) -> None:
        """Drop the waiting frame of a source."""
        self._packets.pop(source, None)

    def acknowledge(self, source: str) -> None:
        """Count a frame of a source as drawn; ignore names of which no frame was sent."""
        if self._in_flight[source] > 1:
            self._in_flight[source] -= 1
        else:
            del self._in_flight[source]
        self._changed.set()

    async def take(self) -> Item:
        """Wait for the next item that the browser may receive: texts first, then frames."""
        while True:
            if self._texts:
                return self._texts.pop(next(iter(self._texts)))
            for source in self._packets:
                if self._in_flight[source] < MAX_IN_FLIGHT:
                    self._in_flight[source] += 1
                    return self._packets.pop(source)
            self._changed.clear()
            await self._changed.wait()


@dataclass(slots=True)
class _Source:
    """The current contents of a source, which a browser receives when it connects.

    ``publisher`` and ``seq`` are those of the last frame.
    """

    lost: int = 0
    publisher: str = ""
    seq: int = 0
    packet: Packet | None = None
    state: dict[str, Any] = field(default_factory=dict)


class Feed:
    """Receives from a publisher while there are browsers, and fills their mailboxes.

    Without browsers there is no subscription, so that the publisher encodes no images. After a
    broken connection, the view subscribes again and forgets all frames and states, because its
    rights may have changed. The publisher then sends the states of the permitted sources.

    Args:
        subscription: a subscription that is not open, with policy "latest" and events.

    Attributes:
        fault: the error that ended ``run``; None if there was none.
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
        """Add a browser for as long as the context lasts; its mailbox has the current contents."""
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
                self._forget_absent()
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
        """Forget frames and states, but not the numbers of lost messages."""
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
        if frame.publisher == source.publisher:  # counts losses between two subscriptions, too
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

    def _forget_absent(self) -> None:
        """Forget sources that the publisher no longer has after a restart."""
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
