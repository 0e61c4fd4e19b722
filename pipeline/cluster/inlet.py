"""Inlets: SUB sockets that receive every message of the publishers at an endpoint."""

from __future__ import annotations

import logging
from collections.abc import Sequence, Set
from typing import Protocol

import zmq

from maskcast.pipeline.log import fields
from maskcast.pipeline.publisher.peers import PeerGuard
from maskcast.pipeline.subscriber.connection import Connection, receive_parts
from maskcast.pipeline.subscriber.receiver import MAX_MESSAGE_BYTES, MAX_PARTS
from maskcast.pipeline.wire.curve import ClientKeys
from maskcast.pipeline.wire.endpoint import (
    bind,
    check_endpoint,
    is_loopback,
    remove_socket_file,
    set_common_options,
)
from maskcast.pipeline.wire.message import ALL_EVENTS, VERSION
from maskcast.pipeline.wire.server_keys import ServerKeys

MAX_CHANGES = 500
"""Maximum number of changed subscriptions that are passed on to publishers at a time."""

_logger = logging.getLogger(__name__)


class Inlet(Protocol):
    """A socket that messages arrive on."""

    endpoint: str

    @property
    def peers(self) -> int:
        """Connected publishers."""

    @property
    def problem(self) -> str:
        """Why an expected connection is missing; "" if there is no problem."""

    def ready_sockets(self) -> Sequence[zmq.Socket[bytes]]:
        """Return the sockets to poll; reconnect first if libzmq does not do it."""

    def receive(self) -> tuple[list[bytes] | None, int]:
        """Return a message and its size in bytes.

        None and 0 if there is no message, None and a number above 0 if it was too long.
        """

    def follow(self, prefixes: Set[bytes]) -> bool:
        """Request frames with these topics only; return False if another call must complete it."""


class BoundInlet:
    """An endpoint that publishers connect to.

    Args:
        endpoint: "tcp://*:5556", "ipc:///path/to/socket".
        keys: encrypt, and admit only publishers whose keys are allowed.
        high_water_mark: messages queued from each publisher.

    Attributes:
        endpoint: the bound endpoint, with the actual port.

    Raises:
        InputError: the endpoint cannot be bound.
    """

    problem = ""

    def __init__(self, endpoint: str, keys: ServerKeys | None, high_water_mark: int) -> None:
        self.endpoint = ""
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._followed: set[bytes] = set()
        # XSUB, because SUB discards events whose source nobody has subscribed to.
        self._socket = self._context.socket(zmq.XSUB)
        self._guard: PeerGuard | None = None
        try:
            set_common_options(self._socket, linger_ms=0, max_part_bytes=MAX_MESSAGE_BYTES)
            self._socket.set(zmq.RCVHWM, high_water_mark)
            self._socket.set(zmq.SNDHWM, 0)  # subscriptions must not be lost
            self._socket.send(b"\x01" + ALL_EVENTS)
            self._guard = PeerGuard(self._socket, keys, receives="messages")
            self.endpoint = bind(self._socket, endpoint, "receive")
        except BaseException:
            self.close()
            raise
        if keys is None and not is_loopback(self.endpoint):
            advice = "anyone on the network can publish here; give --allowed-publishers"
            shown = fields(endpoint=self.endpoint, advice=advice)
            _logger.warning("receiving_without_keys", extra=shown)

    @property
    def peers(self) -> int:
        """Connected publishers."""
        return 0 if self._guard is None else self._guard.connected

    def ready_sockets(self) -> Sequence[zmq.Socket[bytes]]:
        """Return the socket."""
        return (self._socket,)

    def receive(self) -> tuple[list[bytes] | None, int]:
        """Return a message and its size, as in ``Inlet``."""
        return receive_parts(self._socket, MAX_MESSAGE_BYTES, MAX_PARTS)

    def follow(self, prefixes: Set[bytes]) -> bool:
        """Request frames with these topics only; return False if another call must complete it."""
        changes = [b"\x01" + prefix for prefix in prefixes - self._followed]
        changes += [b"\x00" + prefix for prefix in self._followed - prefixes]
        for change in changes[:MAX_CHANGES]:
            self._socket.send(change)
            self._followed ^= {change[1:]}
        return len(changes) <= MAX_CHANGES

    def close(self) -> None:
        """Disconnect the publishers and free the endpoint."""
        self._socket.close(linger=0)
        self._context.term()
        if self._guard is not None:
            self._guard.join()
        remove_socket_file(self.endpoint)


class ConnectedInlet:
    """A connection to a publisher or to another gateway.

    Args:
        context: belongs to the caller, who terminates it.
        endpoint: "tcp://host:port" or "ipc:///path".
        keys: for CURVE, or None.
        high_water_mark: messages queued.

    Raises:
        InputError: the endpoint is invalid.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        endpoint: str,
        keys: ClientKeys | None,
        high_water_mark: int,
    ) -> None:
        self.endpoint = check_endpoint(endpoint, "tcp://host:5555")
        self._connection = Connection(
            context,
            endpoint,
            [f"{VERSION}/"],
            high_water_mark=high_water_mark,
            max_message_bytes=MAX_MESSAGE_BYTES,
            keys=keys,
        )

    @property
    def peers(self) -> int:
        """Connected publishers."""
        return int(self._connection.connected)

    @property
    def problem(self) -> str:
        """Why there is no connection; "" if there is one."""
        return "" if self._connection.connected else self._connection.problem or "not connected"

    def ready_sockets(self) -> Sequence[zmq.Socket[bytes]]:
        """Return the socket and its monitor; reconnect first if libzmq does not do it.

        Called once before each batch, so that the monitor is not read for every message.
        """
        self._connection.process_events()
        self._connection.replace_if_due()
        return (self._connection.socket, self._connection.monitor)

    def receive(self) -> tuple[list[bytes] | None, int]:
        """Return a message and its size, as in ``Inlet``."""
        parts = self._connection.receive(MAX_PARTS)
        if parts is None:
            return None, self._connection.take_oversized()
        return parts, sum(map(len, parts))

    def follow(self, prefixes: Set[bytes]) -> bool:
        """Do nothing: the connection has subscribed to everything from the start."""
        return True

    def close(self) -> None:
        """Disconnect."""
        self._connection.close()
