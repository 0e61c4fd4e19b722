"""Subscribers: the subscriptions to an XPUB socket, and the kept events for new ones."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Sequence

import zmq

from maskcast.pipeline.publisher.peers import PeerGuard
from maskcast.pipeline.publisher.subscriptions import Subscriptions
from maskcast.pipeline.wire.message import ALL_EVENTS, topic

RESEND_S = 1.0
"""Interval of kept events while subscriptions arrive faster than they are read."""

KEPT_AT_ONCE = 100
"""Maximum number of kept events sent at once, so that frames do not wait for them."""

STALLED_S = 0.1
"""Kept events wait this long for space in all subscribers' queues."""

Kept = Callable[[tuple[bytes, ...]], Iterable[Sequence[bytes]]]
"""Returns the kept events whose topics begin with one of these prefixes."""


class Subscribers(ABC):
    """The subscriptions to one XPUB socket, and the kept events that are still to be sent.

    Args:
        lossless: wait for slow subscribers instead of dropping messages for them.
    """

    def __init__(self, lossless: bool = False) -> None:
        self._lossless = lossless
        self._sent_at_s = 0.0  # the last kept event
        self._has_unread = False
        self._joined: set[bytes] = set()  # prefixes of new subscribers
        self._pending: deque[Sequence[bytes]] = deque()
        self._resend_at_s = 0.0

    @property
    def has_backlog(self) -> bool:
        """Whether subscriptions wait to be read, or kept events to be sent."""
        return self._has_unread or bool(self._pending)

    def count(self, source: str) -> int:
        """Count the subscriptions to a source's instances; at least 1 while some are unread."""
        return max(self._count(topic(source, "instances")), int(self._has_unread))

    def answer(self, socket: zmq.Socket[bytes], within_s: float, kept: Kept) -> bool:
        """Read subscriptions for a while, and send some kept events; return whether any joined."""
        self._read(socket, time.monotonic() + within_s)
        is_joined = False
        if not self._pending and (joined := self._take_joined()):
            is_joined = True
            self._pending.extend(kept(joined))
            self._sent_at_s = time.monotonic()
        if self._pending:
            self._send_pending(socket)
        return is_joined

    @abstractmethod
    def prefixes(self) -> set[bytes]:
        """Return the subscribed prefixes; the empty prefix stands for everything."""

    @abstractmethod
    def _count(self, topic: bytes) -> int:
        """Count the subscriptions to a topic."""

    @abstractmethod
    def _enter(self, socket: zmq.Socket[bytes], message: zmq.Frame) -> None:
        """Process a message that the socket has received."""

    def _read(self, socket: zmq.Socket[bytes], deadline_s: float) -> None:
        # Poll first: an exception for every published message would be expensive.
        if not int(socket.get(zmq.EVENTS)) & zmq.POLLIN:
            self._has_unread = False
            return
        try:
            while time.monotonic() < deadline_s:
                self._enter(socket, socket.recv(zmq.DONTWAIT, copy=False))
            self._has_unread = bool(int(socket.get(zmq.EVENTS)) & zmq.POLLIN)
        except zmq.Again:
            self._has_unread = False

    def _send_pending(self, socket: zmq.Socket[bytes]) -> None:
        """Send kept events while all subscribers' queues have space.

        A stalled subscriber must not delay the others: if a queue has no space for ``STALLED_S``,
        the events are sent to the subscribers whose queues have space.
        """
        is_stalled = time.monotonic() - self._sent_at_s >= STALLED_S
        socket.set(zmq.XPUB_NODROP, int(self._lossless or not is_stalled))
        try:
            for _ in range(min(KEPT_AT_ONCE, len(self._pending))):
                socket.send_multipart(self._pending[0], 0 if is_stalled else zmq.DONTWAIT)
                self._pending.popleft()
                self._sent_at_s = time.monotonic()
        except zmq.Again:
            pass  # a queue is full
        finally:
            socket.set(zmq.XPUB_NODROP, int(self._lossless))

    def _take_joined(self) -> tuple[bytes, ...]:
        """Return the prefixes whose kept events are due."""
        joined = tuple(self._joined)
        if self._has_unread:  # send all kept events at intervals, instead of those of each prefix
            if time.monotonic() < self._resend_at_s:
                return ()
            self._resend_at_s = time.monotonic() + RESEND_S
            joined = (b"",)
        self._joined.clear()
        return joined


class OpenSubscribers(Subscribers):
    """Subscribers of a socket without keys; libzmq matches subscriptions to messages itself."""

    def __init__(self, lossless: bool = False) -> None:
        super().__init__(lossless)
        self._subscriptions = Subscriptions()

    def prefixes(self) -> set[bytes]:
        """Return the subscribed prefixes; the empty prefix stands for everything."""
        return self._subscriptions.prefixes()

    def _count(self, topic: bytes) -> int:
        return self._subscriptions.count(topic)

    def _enter(self, socket: zmq.Socket[bytes], message: zmq.Frame) -> None:
        kind, prefix = _split(message)
        if kind == b"\x01":
            self._subscriptions.add(prefix)
            self._joined.add(prefix)
        elif (
            kind == b"\x00" and _property(message, "__fd") is None
        ):  # only if the connection is gone
            self._subscriptions.remove(prefix)


class GatewaySubscribers(OpenSubscribers):
    """The subscriptions of one gateway, which is the only peer of its socket.

    A gateway receives every event, because it keeps the state of all sources, but only those frames
    that its own subscribers have subscribed to. Prefixes cannot express this. Therefore the socket
    is in manual mode and sends everything to the gateway, and its owner calls ``wants`` first.
    """

    def wants(self, topic: bytes) -> bool:
        """Return whether a message is to be sent to the gateway."""
        return topic.endswith(b"/event") or self._has_unread or bool(self._count(topic))

    def _enter(self, socket: zmq.Socket[bytes], message: zmq.Frame) -> None:
        kind, prefix = _split(message)
        if kind == b"\x01":
            socket.set(zmq.SUBSCRIBE, b"")
            self._subscriptions.add(prefix)
            self._joined.add(b"" if prefix == ALL_EVENTS else prefix)
        elif kind == b"\x00":
            self._subscriptions.remove(prefix)


class AdmittedSubscribers(Subscribers):
    """Subscribers of a socket with keys; each receives only the sources that it may see.

    The socket is in manual mode (``ZMQ_XPUB_MANUAL``): its owner decides what the peer that sent
    the last message is subscribed to. After a message that is not a subscription, libzmq confuses
    this peer with another one until all messages are read. Therefore no subscription is granted
    until then, and the peers concerned are disconnected, so that they subscribe again.

    Cancelling a subscription takes effect only if it is narrower than what the peer may see.
    Otherwise the granted part may also belong to another subscription, and is kept; a SUB socket
    discards messages that it has not subscribed to.
    """

    def __init__(self, guard: PeerGuard, lossless: bool = False) -> None:
        super().__init__(lossless)
        self._guard = guard
        self._ignored: set[int] = set()  # connections, while libzmq confuses peers

    def prefixes(self) -> set[bytes]:
        """Return the subscribed prefixes; the empty prefix stands for everything."""
        return self._guard.grants.prefixes()

    def _count(self, topic: bytes) -> int:
        return self._guard.grants.count(topic)

    def _read(self, socket: zmq.Socket[bytes], deadline_s: float) -> None:
        super()._read(socket, deadline_s)
        if self._ignored and not self._has_unread:
            self._guard.disconnect(self._ignored)
            self._ignored = set()

    def _enter(self, socket: zmq.Socket[bytes], message: zmq.Frame) -> None:
        key, number = _property(message, "User-Id"), _property(message, "__fd")
        if key is None or number is None:  # a message of libzmq about a connection that is gone
            return
        kind, prefix = _split(message)
        handle, user = int(number), key.encode()
        if self._ignored or kind not in (b"\x00", b"\x01"):
            self._ignored.add(handle)
            return
        # Identify first: if the rights change after they are read, the connection must be known.
        self._guard.grants.identify(handle, user)
        if (rights := self._guard.rights(user)) is None:  # withdrawn since the handshake
            self._guard.disconnect([handle])
            return
        granted = rights.granted(prefix)
        if kind == b"\x01":
            for part in granted:
                if self._guard.grants.add(handle, part):
                    socket.set(zmq.SUBSCRIBE, part)
                    self._joined.add(part)
        elif granted == [prefix] and prefix not in rights.granted(b""):
            self._guard.grants.remove(handle, prefix)
            socket.set(zmq.UNSUBSCRIBE, prefix)


def _split(message: zmq.Frame) -> tuple[bytes, bytes]:
    """Return the kind of a message, 1 to subscribe or 0 to cancel, and its topic prefix."""
    content = bytes(message.bytes)
    return content[:1], content[1:]


def _property(message: zmq.Frame, name: str) -> str | None:
    """Return a property of the connection that a message arrived on.

    None for libzmq's own messages about connections that are gone, which have no properties.
    """
    try:
        return str(message.get(name))
    except zmq.ZMQError:
        return None
