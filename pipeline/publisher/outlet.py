"""Outlets: XPUB sockets that publish, and the subscriptions to them."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import zmq

from maskcast.pipeline.log import fields
from maskcast.pipeline.publisher.peers import PeerGuard
from maskcast.pipeline.publisher.subscriptions import Subscriptions
from maskcast.pipeline.wire.curve import ClientKeys, ServerKeys
from maskcast.pipeline.wire.endpoint import (
    bind,
    is_loopback,
    remove_socket_file,
    set_common_options,
)
from maskcast.pipeline.wire.message import topic
from maskcast.pipeline.wire.reconnecting import MIN_BACKOFF_S, ReconnectingSocket

RESEND_S = 1.0
"""While subscriptions arrive faster than they are read, kept events are sent this often."""

KEPT_AT_ONCE = 100
"""Kept events sent before the next message may be, so that they do not overflow a queue."""

MAX_SUBSCRIPTION_BYTES = 128
"""Longest subscription: topics are shorter, and longer ones cost memory."""

MAX_HANDSHAKE_BYTES = 512
"""The same limit with CURVE, whose handshake needs more."""

_logger = logging.getLogger(__name__)

Kept = Callable[[tuple[bytes, ...]], Iterable[Sequence[bytes]]]
"""Returns the kept events whose topics begin with one of these prefixes."""


class Outlet(Protocol):
    """A socket that messages are sent to. Not thread-safe."""

    @property
    def sockets(self) -> Sequence[zmq.Socket[bytes]]:
        """The sockets that become readable when something is to be done here."""

    @property
    def has_backlog(self) -> bool:
        """Whether subscriptions wait to be read, or kept events to be sent."""

    @property
    def cut_off(self) -> int:
        """Connections closed because the peer sent a message that was too long or malformed."""

    def send(self, parts: Sequence[bytes]) -> None:
        """Send a message to those who subscribed to it."""

    def answer(self, within_s: float, kept: Kept) -> None:
        """Read subscriptions for at most ``within_s``, and send new subscribers kept events.

        Call it again soon while there is a backlog.
        """

    def count(self, source: str) -> int:
        """Count the subscriptions to a source's instances; at least 1 while some are unread."""

    def close(self) -> None:
        """Close the socket; what is queued is sent first, for as long as it lingers."""


class _Subscribers:
    """The subscriptions to one XPUB socket, and the kept events that are still to be sent."""

    def __init__(self) -> None:
        self._subscriptions = Subscriptions()
        self._has_unread = False
        self._joined: set[bytes] = set()  # prefixes of new subscribers
        self._pending: deque[Sequence[bytes]] = deque()
        self._resend_at_s = 0.0

    @property
    def has_backlog(self) -> bool:
        return self._has_unread or bool(self._pending)

    def count(self, source: str) -> int:
        counted = self._subscriptions.count(topic(source, "instances"))
        return max(counted, int(self._has_unread))

    def answer(self, socket: zmq.Socket[bytes], within_s: float, kept: Kept) -> bool:
        """Read subscriptions for a while, and send some kept events; return whether any joined."""
        self._read(socket, time.monotonic() + within_s)
        is_joined = False
        if not self._pending and (joined := self._take_joined()):
            is_joined = True
            self._pending.extend(kept(joined))
        for _ in range(min(KEPT_AT_ONCE, len(self._pending))):
            socket.send_multipart(self._pending.popleft())
        return is_joined

    def _read(self, socket: zmq.Socket[bytes], deadline_s: float) -> None:
        # Asked first, since an exception for every message costs more than all else here.
        if not int(socket.get(zmq.EVENTS)) & zmq.POLLIN:
            self._has_unread = False
            return
        try:
            while time.monotonic() < deadline_s:
                message = socket.recv(zmq.DONTWAIT, copy=False)
                content = bytes(message.bytes)
                kind, prefix = content[:1], content[1:]
                if kind == b"\x01":
                    self._subscriptions.add(prefix)
                    self._joined.add(prefix)
                elif kind == b"\x00" and not _is_from_peer(message):
                    self._subscriptions.remove(prefix)
            self._has_unread = bool(int(socket.get(zmq.EVENTS)) & zmq.POLLIN)
        except zmq.Again:
            self._has_unread = False

    def _take_joined(self) -> tuple[bytes, ...]:
        """Return the prefixes whose kept events are due."""
        joined = tuple(self._joined)
        if self._has_unread:  # answer everyone now and then, instead of each prefix
            if time.monotonic() < self._resend_at_s:
                return ()
            self._resend_at_s = time.monotonic() + RESEND_S
            joined = (b"",)
        self._joined.clear()
        return joined


class BoundOutlet:
    """An endpoint that subscribers connect to.

    XPUB sends kept events to other subscribers too, who recognise them by their sequence numbers.

    Args:
        endpoint: "tcp://*:5555", "ipc:///path/to/socket".
        high_water_mark: messages queued for a slow subscriber.
        keys: encrypt, and admit only clients whose keys are allowed.
        lossless: wait for slow subscribers instead of dropping messages for them.
        linger_ms: how long closing waits until queued messages are sent.

    Attributes:
        endpoint: the bound endpoint, with the real port.

    Raises:
        InputError: the endpoint cannot be bound.
    """

    def __init__(
        self,
        endpoint: str,
        *,
        high_water_mark: int,
        keys: ServerKeys | None,
        lossless: bool,
        linger_ms: int,
    ) -> None:
        self.endpoint = ""
        self._subscribers = _Subscribers()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.XPUB)
        self._guard: PeerGuard | None = None
        try:
            self._socket.set(zmq.XPUB_VERBOSER, 1)
            self._socket.set(zmq.XPUB_NODROP, int(lossless))
            self._socket.set(zmq.SNDHWM, high_water_mark)
            # Subscriptions of one peer, before libzmq's own queue.
            self._socket.set(zmq.RCVHWM, 100)
            set_common_options(
                self._socket,
                linger_ms=linger_ms,
                max_part_bytes=MAX_SUBSCRIPTION_BYTES if keys is None else MAX_HANDSHAKE_BYTES,
            )
            self._guard = PeerGuard(self._socket, keys)
            self.endpoint = bind(self._socket, endpoint, "publish")
        except BaseException:
            self.close()
            raise
        if keys is None and not is_loopback(self.endpoint):
            advice = (
                "make keys with `maskcast keys new` and set publish.curve, "
                "or publish on tcp://127.0.0.1:<port>"
            )
            shown = fields(endpoint=self.endpoint, advice=advice)
            _logger.warning("publishing_without_keys", extra=shown)

    @property
    def sockets(self) -> Sequence[zmq.Socket[bytes]]:
        """The socket."""
        return (self._socket,)

    @property
    def has_backlog(self) -> bool:
        """Whether subscriptions wait to be read, or kept events to be sent."""
        return self._subscribers.has_backlog

    @property
    def cut_off(self) -> int:
        """Connections closed because the peer sent a message that was too long or malformed."""
        return 0 if self._guard is None else self._guard.cut_off

    @property
    def peers(self) -> int:
        """Connected subscribers."""
        return 0 if self._guard is None else self._guard.connected

    def send(self, parts: Sequence[bytes]) -> None:
        """Send a message to those who subscribed to it."""
        self._socket.send_multipart(parts)

    def answer(self, within_s: float, kept: Kept) -> None:
        """Read subscriptions for at most ``within_s``, and send new subscribers kept events.

        Call it again soon while there is a backlog.
        """
        self._subscribers.answer(self._socket, within_s, kept)

    def count(self, source: str) -> int:
        """Count the subscriptions to a source's instances; at least 1 while some are unread."""
        return self._subscribers.count(source)

    def close(self) -> None:
        """Send what is queued, for as long as the socket lingers, and free the endpoint."""
        self._socket.close()
        self._context.term()
        if self._guard is not None:
            self._guard.join()
        remove_socket_file(self.endpoint)


class GatewayOutlet(ReconnectingSocket):
    """A connection to a gateway, which subscribes and passes messages on.

    Args:
        context: belongs to the caller, who terminates it.
        endpoint: the gateway's endpoint for publishers.
        high_water_mark: messages queued for a slow gateway.
        keys: for CURVE, or None.
        linger_ms: how long closing waits until queued messages are sent.

    Raises:
        InputError: the endpoint cannot be connected to.
    """

    cut_off = 0  # it is the gateway that cuts off

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        endpoint: str,
        *,
        high_water_mark: int,
        keys: ClientKeys | None,
        linger_ms: int,
    ) -> None:
        self._high_water_mark = high_water_mark
        self._linger_ms = linger_ms
        self._subscribers = _Subscribers()
        super().__init__(context, endpoint, kind=zmq.XPUB, keys=keys, peer="gateway")

    @property
    def sockets(self) -> Sequence[zmq.Socket[bytes]]:
        """The socket and its monitor."""
        return (self.socket, self.monitor)

    @property
    def has_backlog(self) -> bool:
        """Whether subscriptions wait to be read, or kept events to be sent."""
        return self._subscribers.has_backlog

    def send(self, parts: Sequence[bytes]) -> None:
        """Send a message to the gateway, if it is connected."""
        self.socket.send_multipart(parts)

    def answer(self, within_s: float, kept: Kept) -> None:
        """Connect again if libzmq does not, and send a gateway that has connected kept events."""
        self.process_events()
        self.replace_if_due()
        if self._subscribers.answer(self.socket, within_s, kept):
            self._backoff_s = MIN_BACKOFF_S

    def count(self, source: str) -> int:
        """Count the subscriptions to a source's instances; at least 1 while some are unread."""
        return self._subscribers.count(source)

    def close(self) -> None:
        """Close the socket; what is queued is sent first, for as long as it lingers."""
        self.monitor.close(linger=0)
        self.socket.close()

    def _on_abandoned(self) -> None:
        self._report_failure("the gateway closed the connection")

    def _prepare(self, socket: zmq.Socket[bytes]) -> None:
        self._subscribers = _Subscribers()  # those of the former socket are gone with it
        socket.set(zmq.XPUB_VERBOSER, 1)
        socket.set(zmq.SNDHWM, self._high_water_mark)
        socket.set(zmq.RCVHWM, 100)
        # Without a connection, forget the gateway's subscriptions and queue nothing for it.
        socket.set(zmq.IMMEDIATE, 1)
        set_common_options(socket, linger_ms=self._linger_ms, max_part_bytes=MAX_HANDSHAKE_BYTES)


def _is_from_peer(message: zmq.Frame) -> bool:
    """Whether a peer sent it, and not libzmq for one whose connection is gone.

    libzmq's own messages have no metadata, so that asking for any property of theirs fails.
    """
    try:
        message.get("__fd")
    except zmq.ZMQError:
        return False
    return True
