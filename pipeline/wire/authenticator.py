"""Authenticator: lets those subscribe whose keys are allowed, and tells of those it refuses."""

from __future__ import annotations

import logging
import os
import socket as posix_socket
import threading
from typing import Any

import zmq
from zmq.utils import z85
from zmq.utils.monitor import parse_monitor_message

from maskcast.pipeline.wire.curve import ServerKeys

MOST_ADDRESSES = 256
"""So many refused addresses are told of by name: a stranger shall fill neither log nor memory."""

LOCAL, UNKNOWN = "this machine", "an unknown address"
"""Stand for the address of whoever comes by ipc://, and who was gone before it could be asked."""

_ZAP = "inproc://zeromq.zap.01"
_MONITOR = "inproc://maskcast.monitor"
# Who finds that the server asks for keys may hang up before the server finds that there are none.
_FAILED = zmq.Event.HANDSHAKE_FAILED_PROTOCOL | zmq.Event.HANDSHAKE_FAILED_NO_DETAIL
_EVENTS = zmq.Event.ACCEPTED | zmq.Event.DISCONNECTED | _FAILED

_logger = logging.getLogger(__name__)


class Authenticator:
    """Guards a socket that is yet to be bound, by CURVE (RFC 26) and ZAP (RFC 27).

    A thread of its own answers libzmq's questions, so that a handshake never waits for a frame nor
    a frame for a handshake. It ends when the socket's context is terminated.

    Who has no key, or another server's, fails before ZAP is asked; the socket's monitor tells.

    Args:
        socket: will be secured; bind it afterwards.
        keys: the server's own, and those of its clients.
    """

    def __init__(self, socket: zmq.Socket[bytes], keys: ServerKeys) -> None:
        self._allowed = {z85.decode(key) for key in keys.allowed_clients}
        self._told: set[str] = set()
        self._peers: dict[int, str] = {}
        self._failed = False
        socket.set(zmq.CURVE_SERVER, 1)
        socket.set(zmq.CURVE_PUBLICKEY, keys.own.public)
        socket.set(zmq.CURVE_SECRETKEY, keys.own.secret)
        socket.set(zmq.ZAP_DOMAIN, b"maskcast")
        socket.set(zmq.ZAP_ENFORCE_DOMAIN, 1)  # nobody enters while nobody answers
        context = socket.context
        zap: zmq.Socket[bytes] = context.socket(zmq.REP)
        zap.bind(_ZAP)
        socket.monitor(_MONITOR, _EVENTS)
        monitor: zmq.Socket[bytes] = context.socket(zmq.PAIR)
        monitor.connect(_MONITOR)
        self._thread = threading.Thread(
            target=self._serve, args=(zap, monitor), name="maskcast-authenticator", daemon=True
        )
        self._thread.start()

    def join(self) -> None:
        """Wait for the thread to end, after the context was terminated."""
        self._thread.join()

    def _serve(self, zap: zmq.Socket[bytes], monitor: zmq.Socket[bytes]) -> None:
        poller = zmq.Poller()
        poller.register(zap, zmq.POLLIN)
        poller.register(monitor, zmq.POLLIN)
        try:
            while True:
                for ready, _ in poller.poll():
                    if ready is zap:
                        zap.send_multipart(self._answer(zap.recv_multipart()))
                    else:
                        self._hear(parse_monitor_message(monitor.recv_multipart()))
        except zmq.ContextTerminated:
            pass
        finally:
            zap.close(linger=0)
            monitor.close(linger=0)

    def _answer(self, request: list[bytes]) -> list[bytes]:
        """Answer a ZAP request: version, id, domain, address, identity, mechanism, credentials."""
        version, number, _, address, _, mechanism, *credentials = request
        if mechanism == b"CURVE" and credentials[0] in self._allowed:
            return [version, number, b"200", b"OK", b"", b""]
        # Of an ipc:// peer it is localhost:uid:gid:pid, another one with every process.
        local = address.startswith(b"localhost:")
        peer = LOCAL if local else address.decode("ascii", "replace")
        self._refuse(peer, "its key is not among those allowed")
        return [version, number, b"400", b"this key is not allowed", b"", b""]

    def _hear(self, event: Any) -> None:
        """Learn from the monitor who failed: that event names nobody, the next does."""
        kind, handle = event["event"], event["value"]
        if kind & _FAILED:
            self._failed = True
        elif kind == zmq.Event.ACCEPTED:
            local = event["endpoint"].startswith(b"ipc")
            self._peers[handle] = LOCAL if local else _address_of(handle)
        elif kind == zmq.Event.DISCONNECTED:
            address, failed = self._peers.pop(handle, UNKNOWN), self._failed
            self._failed = False
            if failed:
                self._refuse(address, "it showed no key, or does not know this server's")

    def _refuse(self, address: str, reason: str) -> None:
        if address in self._told or len(self._told) > MOST_ADDRESSES:
            return
        self._told.add(address)
        if len(self._told) > MOST_ADDRESSES:
            _logger.warning("refused subscribers from more than %d addresses", MOST_ADDRESSES)
        else:
            _logger.warning("refused a subscriber at %s: %s", address, reason)


def _address_of(handle: int) -> str:
    """Say who is connected to a TCP socket of libzmq's, if he still is."""
    try:
        own = os.dup(handle)
    except OSError:
        return UNKNOWN
    try:
        connection = posix_socket.socket(fileno=own)
    except OSError:  # the number is another file's by now
        os.close(own)
        return UNKNOWN
    with connection:
        try:
            return str(connection.getpeername()[0])
        except (OSError, IndexError):
            return UNKNOWN
