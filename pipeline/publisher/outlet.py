"""Outlets: XPUB sockets for publishing, with their subscriptions."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Protocol

import zmq

from maskcast.pipeline.log import fields
from maskcast.pipeline.publisher.peers import PeerGuard
from maskcast.pipeline.publisher.subscribers import (
    AdmittedSubscribers,
    GatewaySubscribers,
    Kept,
    OpenSubscribers,
    Subscribers,
)
from maskcast.pipeline.wire.curve import ClientKeys
from maskcast.pipeline.wire.endpoint import (
    bind,
    is_loopback,
    remove_socket_file,
    set_common_options,
)
from maskcast.pipeline.wire.reconnecting import MIN_BACKOFF_S, ReconnectingSocket
from maskcast.pipeline.wire.server_keys import ServerKeys

MAX_SUBSCRIPTION_BYTES = 128
"""Longest subscription: topics are shorter, and longer ones cost memory."""

MAX_HANDSHAKE_BYTES = 512
"""The same limit with CURVE, whose handshake needs more."""

SILENT_FOR_S = 5.0
"""A gateway without a connection for this long is reported."""

_logger = logging.getLogger(__name__)


class Outlet(Protocol):
    """A socket that messages are sent to. Not thread-safe."""

    @property
    def sockets(self) -> Sequence[zmq.Socket[bytes]]:
        """The sockets that become readable when ``answer`` has work to do."""

    @property
    def has_backlog(self) -> bool:
        """Whether subscriptions wait to be read, or kept events to be sent."""

    @property
    def cut_off(self) -> int:
        """Connections closed because the peer sent a message that was too long or malformed."""

    def send(self, parts: Sequence[bytes]) -> None:
        """Send a message to its subscribers."""

    def answer(self, within_s: float, kept: Kept) -> None:
        """Read subscriptions for at most ``within_s``, and send new subscribers kept events.

        Call it again soon while there is a backlog.
        """

    def count(self, source: str) -> int:
        """Count the subscriptions to a source's instances; at least 1 while some are unread."""

    def close(self) -> None:
        """Send queued messages for at most the linger time, and close the socket."""


class BoundOutlet:
    """An endpoint that subscribers connect to.

    Kept events for a new subscriber also reach the others, which ignore them because of their
    sequence numbers.

    Args:
        endpoint: "tcp://*:5555" or "ipc:///path/to/socket".
        high_water_mark: messages queued for a slow subscriber.
        keys: encrypt, and admit only allowed clients, each to the sources that it may see; None for
            no encryption.
        lossless: wait for slow subscribers instead of dropping messages for them.
        linger_ms: maximum time for which ``close`` sends queued messages.

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
        self._subscribers: Subscribers = OpenSubscribers(lossless)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.XPUB)
        self._guard: PeerGuard | None = None
        try:
            self._socket.set(zmq.XPUB_VERBOSER, 1)
            self._socket.set(zmq.XPUB_MANUAL, int(keys is not None))
            self._socket.set(zmq.XPUB_NODROP, int(lossless))
            self._socket.set(zmq.SNDHWM, high_water_mark)
            # Subscriptions queued for one peer.
            self._socket.set(zmq.RCVHWM, 100)
            set_common_options(
                self._socket,
                linger_ms=linger_ms,
                max_part_bytes=MAX_SUBSCRIPTION_BYTES if keys is None else MAX_HANDSHAKE_BYTES,
            )
            self._guard = PeerGuard(self._socket, keys)
            if keys is not None:
                self._subscribers = AdmittedSubscribers(self._guard, lossless)
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
        """The sockets that become readable when ``answer`` has work to do."""
        return (self._socket,)

    @property
    def has_backlog(self) -> bool:
        """Whether subscriptions wait to be read, or kept events to be sent."""
        return self._subscribers.has_backlog

    @property
    def cut_off(self) -> int:
        """Connections closed because the peer sent a message that was too long or malformed."""
        return 0 if self._guard is None else self._guard.cut_off

    def prefixes(self) -> set[bytes]:
        """Return the subscribed prefixes; the empty prefix stands for everything."""
        return self._subscribers.prefixes()

    @property
    def peers(self) -> int:
        """Number of connected subscribers."""
        return 0 if self._guard is None else self._guard.connected

    def send(self, parts: Sequence[bytes]) -> None:
        """Send a message to its subscribers."""
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
        """Send queued messages for at most the linger time, and free the endpoint."""
        self._socket.close()
        self._context.term()
        if self._guard is not None:
            self._guard.join()
        remove_socket_file(self.endpoint)


class GatewayOutlet(ReconnectingSocket):
    """A connection to a gateway, which subscribes and forwards messages.

    Args:
        context: belongs to the caller, who terminates it.
        endpoint: the gateway's endpoint for publishers.
        high_water_mark: messages queued for a slow gateway.
        keys: for CURVE; None for no encryption.
        linger_ms: maximum time for which ``close`` sends queued messages.

    Raises:
        InputError: the endpoint cannot be connected to.
    """

    cut_off = 0  # only a bound socket closes a peer's connection

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
        self._connected_at_s = time.monotonic()
        self._subscribers = GatewaySubscribers()
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
        """Send a message to the gateway, if it is connected and wants it."""
        if self._subscribers.wants(parts[0]):
            self.socket.send_multipart(parts)

    def answer(self, within_s: float, kept: Kept) -> None:
        """Reconnect if libzmq does not, and send kept events to a gateway that just connected."""
        self.process_events()
        self.replace_if_due()
        if self.connected:
            self._connected_at_s = time.monotonic()
        elif time.monotonic() - self._connected_at_s > SILENT_FOR_S and not self.problem:
            self._report_failure(
                f"no connection for {SILENT_FOR_S:g} s; check that the gateway is running"
            )
        if self._subscribers.answer(self.socket, within_s, kept):
            self._backoff_s = MIN_BACKOFF_S

    def count(self, source: str) -> int:
        """Count the subscriptions to a source's instances; at least 1 while some are unread."""
        return self._subscribers.count(source)

    def close(self) -> None:
        """Send queued messages for at most the linger time, and close the socket."""
        self.monitor.close(linger=0)
        self.socket.close()

    def _on_abandoned(self) -> None:
        self._report_failure("the gateway closed the connection")

    def _prepare(self, socket: zmq.Socket[bytes]) -> None:
        self._subscribers = GatewaySubscribers()  # a new socket has no subscriptions
        socket.set(zmq.XPUB_MANUAL, 1)
        socket.set(zmq.SNDHWM, self._high_water_mark)
        socket.set(zmq.RCVHWM, 100)
        # While the gateway is disconnected, forget its subscriptions and queue nothing for it.
        socket.set(zmq.IMMEDIATE, 1)
        set_common_options(socket, linger_ms=self._linger_ms, max_part_bytes=MAX_HANDSHAKE_BYTES)
