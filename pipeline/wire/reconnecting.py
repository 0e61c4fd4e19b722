"""ReconnectingSocket: a socket that is replaced when libzmq stops reconnecting."""

from __future__ import annotations

import itertools
import logging
import time
from abc import ABC, abstractmethod
from typing import Literal

import zmq

from maskcast.engines.errors import InputError
from maskcast.pipeline.log import fields
from maskcast.pipeline.wire.curve import ClientKeys
from maskcast.pipeline.wire.endpoint import reason
from maskcast.pipeline.wire.socket_events import receive_event

MIN_BACKOFF_S, MAX_BACKOFF_S = 0.1, 5.0
"""First and longest delay before a socket is replaced; it doubles with every failure."""

ABANDONED_AFTER_S = 1.0
"""If libzmq does not report within this time that it reconnects, it has abandoned the peer."""

_REFUSED = zmq.Event.HANDSHAKE_FAILED_AUTH
_FAILED = zmq.Event.HANDSHAKE_FAILED_PROTOCOL | zmq.Event.HANDSHAKE_FAILED_NO_DETAIL
_RETRIES = zmq.Event.CONNECT_RETRIED | zmq.Event.CONNECT_DELAYED
_EVENTS = _REFUSED | _FAILED | _RETRIES | zmq.Event.HANDSHAKE_SUCCEEDED | zmq.Event.DISCONNECTED
_monitor_numbers = itertools.count()

_logger = logging.getLogger(__name__)


class ReconnectingSocket(ABC):
    """A socket that connects to one endpoint, and recovers where libzmq does not.

    libzmq reconnects after a lost connection, but not after a failed handshake or a part that
    exceeds ``ZMQ_MAXMSGSIZE``. The socket's monitor distinguishes these cases. The socket is then
    closed and replaced by a new one, with backoff. Not thread-safe.

    Args:
        context: the ZeroMQ context; the caller terminates it.
        endpoint: "tcp://host:port" or "ipc:///path".
        kind: the socket's type.
        keys: for CURVE; None for no encryption.
        peer: what is at the endpoint, for messages.

    Attributes:
        endpoint: the endpoint.
        socket: the current socket, for polling.
        monitor: its monitor, for polling.
        connected: whether there is a connection whose handshake has succeeded.
        broken: whether such a connection has ever been lost.
        problem: why there is no connection, one line; "" if no reason is known.

    Raises:
        InputError: the endpoint cannot be connected to.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        endpoint: str,
        *,
        kind: int,
        keys: ClientKeys | None,
        peer: Literal["publisher", "gateway"],
    ) -> None:
        self._context = context
        self._kind = kind
        self.endpoint = endpoint
        self._keys = keys
        self._peer = peer
        self._backoff_s = MIN_BACKOFF_S
        self._replace_at_s: float | None = None
        self._handshake_failed = False
        self._reported = ""
        self.connected = self.broken = False
        self.problem = ""
        self.socket, self.monitor = self._connect()

    @abstractmethod
    def _prepare(self, socket: zmq.Socket[bytes]) -> None:
        """Set the options of a socket that is not connected yet."""

    @abstractmethod
    def _on_abandoned(self) -> None:
        """Note that libzmq has abandoned the peer although the handshake had succeeded."""

    def process_events(self) -> None:
        """Read the monitor, and schedule a replacement if libzmq has abandoned the peer."""
        while self.monitor.poll(0):
            event = receive_event(self.monitor).kind
            if event & _RETRIES:
                self._replace_at_s = None
            elif event == zmq.Event.HANDSHAKE_SUCCEEDED:
                self._handshake_failed, self._reported = False, ""
                self.connected = True
                self.problem = ""
            elif event == zmq.Event.DISCONNECTED:
                self.broken |= self.connected
                self.connected = False
                self._schedule()
            elif event & (_REFUSED | _FAILED):
                self._handshake_failed = True
                self._report_failure(
                    f"the {self._peer} does not allow this client's key"
                    if event & _REFUSED
                    else "the handshake failed: one side uses keys and the other does not, "
                    f"the server key is wrong, or this is not a ZeroMQ {self._peer}"
                )
                self._schedule()

    def replace_if_due(self) -> float | None:
        """Replace the socket if a replacement is due.

        Returns:
            Seconds until a replacement is due; None if none is scheduled.
        """
        if self._replace_at_s is None:
            return None
        if (left_s := self._replace_at_s - time.monotonic()) > 0:
            return left_s
        if not self._handshake_failed:
            self._on_abandoned()
        self.close()
        self.connected = False
        self._replace_at_s = None
        self._handshake_failed = False
        try:
            self.socket, self.monitor = self._connect()
        except (InputError, zmq.ZMQError) as error:  # for example, no file descriptors are left
            if isinstance(error, zmq.ContextTerminated):
                raise
            self._handshake_failed = True  # the reason is not a part that was too long
            self._report_failure(str(error))
            self._schedule()
            return self._backoff_s
        return None

    def close(self) -> None:
        """Disconnect."""
        self.monitor.close(linger=0)
        self.socket.close(linger=0)

    def _connect(self) -> tuple[zmq.Socket[bytes], zmq.Socket[bytes]]:
        socket = self._context.socket(self._kind)
        monitor = self._context.socket(zmq.PAIR)
        try:
            self._prepare(socket)
            socket.set(zmq.RECONNECT_IVL, 100)
            socket.set(zmq.RECONNECT_IVL_MAX, 1000)
            socket.set(zmq.IPV6, int("[" in self.endpoint))
            if self._keys is not None:
                self._keys.apply(socket)
            address = f"inproc://maskcast.connection.{next(_monitor_numbers)}"
            socket.monitor(address, _EVENTS)
            monitor.connect(address)
            socket.connect(self.endpoint)
        except zmq.ZMQError as error:
            monitor.close(linger=0)
            socket.close(linger=0)
            if isinstance(error, zmq.ContextTerminated):
                raise
            raise InputError(
                f"cannot connect to {self.endpoint}: {reason(error)}; "
                "use tcp://host:5555 or ipc:///path/to/socket"
            ) from error
        return socket, monitor

    def _schedule(self) -> None:
        if self._replace_at_s is None:
            wait_s = max(self._backoff_s, ABANDONED_AFTER_S)
            self._replace_at_s = time.monotonic() + wait_s
            self._backoff_s = min(2 * self._backoff_s, MAX_BACKOFF_S)

    def _report_failure(self, problem: str) -> None:
        """Log a problem, unless it was already logged since the last successful handshake."""
        self.problem = problem
        if problem != self._reported:
            self._reported = problem
            self._log()

    def _log(self, **more: str) -> None:
        shown = fields(endpoint=self.endpoint, reason=self.problem, **more)
        if self._peer == "gateway":
            _logger.warning("gateway_connection_failed", extra=shown)
        else:
            _logger.warning("subscription_failed", extra=shown)
