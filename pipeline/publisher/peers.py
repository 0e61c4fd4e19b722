"""PeerGuard: decides who may connect to a bound socket, and disconnects peers that flood it."""

from __future__ import annotations

import logging
import os
import socket as posix_socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Literal

import zmq
from zmq.utils import z85
from zmq.utils.monitor import parse_monitor_message

from maskcast.pipeline.log import fields
from maskcast.pipeline.publisher.limits import AddressLimits
from maskcast.pipeline.wire.curve import AllowedClients, ServerKeys

MAX_ADDRESSES = 256
"""Addresses that are reported by name, so that strangers fill neither the log nor the memory."""

FLOOD_CHECK_S = 0.1
"""How often the bytes received from up to 100 peers are looked at."""

SUSPECT_BYTES = 4096
"""Peers of a flooding address that sent more than this since the last check are disconnected."""

KEYS_CHECK_S = 0.5
"""Interval at which the keys of the allowed clients are looked at."""

HELD_CONNECTIONS = 128
"""Connections that are kept open until libzmq's end of them is reported, to see which side closed;
peers beyond these are not diagnosed. Each takes one more file descriptor."""

CUT_OFF_REPORT_S = 60.0
"""A peer's address that is cut off again is reported at most once in this time."""

RECENT_MS = 1000
"""A peer was cut off for what it sent if that was less than this before; heartbeats take longer."""

LOCAL, UNKNOWN = "this machine", "an unknown address"
"""The address of an ``ipc://`` peer, and of one that was gone before it could be looked up."""

_ZAP = "inproc://zeromq.zap.01"
_MONITOR = "inproc://maskcast.monitor"
# A client may hang up as soon as it learns that the server uses keys: hence NO_DETAIL.
_FAILED = zmq.Event.HANDSHAKE_FAILED_PROTOCOL | zmq.Event.HANDSHAKE_FAILED_NO_DETAIL
_EVENTS = zmq.Event.ACCEPTED | zmq.Event.DISCONNECTED | _FAILED
_BYTES_RECEIVED = 128
_LAST_DATA_RECEIVED = 52
"""Offsets of ``tcpi_bytes_received`` and ``tcpi_last_data_recv`` (milliseconds ago) in Linux's
``struct tcp_info`` (since 4.1); its first byte is the state."""

_TCP_ESTABLISHED = 1

_logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Peer:
    """A connection: address; address and port (None: not TCP); bytes received; its start.

    ``held`` is a second descriptor of the connection, which tells after libzmq has closed its own
    which side ended it; None if it could not be had.
    """

    address: str
    name: Any
    received: int = 0
    since_s: float = field(default_factory=time.monotonic)
    held: posix_socket.socket | None = None

    def release(self) -> None:
        if self.held is not None:
            self.held.close()
            self.held = None


class PeerGuard:
    """Guards a socket that is not bound yet, on a thread of its own.

    With keys it secures the socket by CURVE (RFC 26) and answers libzmq's questions about clients
    (ZAP, RFC 27), so that a handshake never waits for a frame nor a frame for a handshake. The keys
    of the allowed clients are read again when their files change; when a key is withdrawn, all
    peers are disconnected and those still allowed connect again.

    With and without keys, a TCP peer that sends more than subscribers ever need is disconnected and
    its address blocked for a while (``AddressLimits``): libzmq queues every subscription without a
    limit, in about five times its size.

    libzmq closes the connection of a peer that sends a message longer than ``MAXMSGSIZE``, such as
    a too long subscription, and says nothing; the peer may connect again without that subscription
    and receive nothing for ever. This is logged (``subscriber_cut_off``).

    The thread ends when the socket's context is terminated.

    Args:
        socket: bind it afterwards.
        keys: the server's own, and those of its clients; None for no encryption.
        receives: what the socket receives: "requests", whose bytes are limited, or "messages" of
            publishers, which are not.

    Attributes:
        cut_off: connections that libzmq closed because of what the peer sent.
    """

    def __init__(
        self,
        socket: zmq.Socket[bytes],
        keys: ServerKeys | None,
        *,
        receives: Literal["requests", "messages"] = "requests",
    ) -> None:
        self._receives = receives
        self._clients = None if keys is None else AllowedClients(keys)
        self._refused: set[str] = set()
        self._unstable: set[str] = set()
        self._cut_off_at_s: dict[str, float] = {}
        self.cut_off = 0
        self._limits = AddressLimits()
        self._peers: dict[int, _Peer] = {}
        self._handshake_failed = False
        context = socket.context
        self._zap: zmq.Socket[bytes] | None = None
        if keys is not None:
            socket.set(zmq.CURVE_SERVER, 1)
            socket.set(zmq.CURVE_PUBLICKEY, keys.own.public)
            socket.set(zmq.CURVE_SECRETKEY, keys.own.secret)
            socket.set(zmq.ZAP_DOMAIN, b"maskcast")
            socket.set(zmq.ZAP_ENFORCE_DOMAIN, 1)  # without an answer no client may connect
        self._monitor: zmq.Socket[bytes] = context.socket(zmq.PAIR)
        try:
            if keys is not None:
                self._zap = context.socket(zmq.REP)
                self._zap.bind(_ZAP)
            socket.monitor(_MONITOR, _EVENTS)
            self._monitor.connect(_MONITOR)
        except zmq.ZMQError:  # the context is being terminated, which waits for its sockets
            self._close()
            raise
        self._thread = threading.Thread(target=self._run, name="maskcast-peers", daemon=True)
        self._thread.start()

    @property
    def connected(self) -> int:
        """Connections that are open, some of them perhaps in their handshake."""
        return len(self._peers)

    def join(self) -> None:
        """Wait for the thread to end, after the context was terminated."""
        self._thread.join()

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._monitor, zmq.POLLIN)
        if self._zap is not None:
            poller.register(self._zap, zmq.POLLIN)
        flood_at_s = keys_at_s = time.monotonic()
        try:
            while True:
                for ready, _ in poller.poll(self._interval_ms()):
                    if ready is self._zap:
                        self._zap.send_multipart(self._reply(self._zap.recv_multipart()))
                    else:
                        self._track(parse_monitor_message(self._monitor.recv_multipart()))
                now_s = time.monotonic()
                if self._is_flood_check_due(now_s - flood_at_s):
                    self._check_floods(now_s)
                    flood_at_s = now_s
                if self._clients is not None and now_s - keys_at_s >= KEYS_CHECK_S:
                    keys_at_s = now_s
                    if self._clients.reload():
                        self._disconnect_all()
        except zmq.ContextTerminated:
            pass
        finally:
            self._close()

    def _is_flood_check_due(self, passed_s: float) -> bool:
        return self._receives == "requests" and passed_s >= FLOOD_CHECK_S * max(
            1, len(self._peers) / 100
        )

    def _close(self) -> None:
        for peer in self._peers.values():
            peer.release()
        self._monitor.close(linger=0)
        if self._zap is not None:
            self._zap.close(linger=0)

    def _interval_ms(self) -> int | None:
        if self._peers and self._receives == "requests":
            return int(FLOOD_CHECK_S * 1000)
        return None if self._clients is None else int(KEYS_CHECK_S * 1000)

    def _reply(self, request: list[bytes]) -> list[bytes]:
        """Answer a ZAP request: version, id, domain, address, identity, mechanism, credentials."""
        version, number, _, address, _, mechanism, *credentials = request
        if (
            self._clients is not None
            and mechanism == b"CURVE"
            and z85.encode(credentials[0]) in self._clients.keys
        ):
            return [version, number, b"200", b"OK", b"", b""]
        # The address of an ipc:// peer is localhost:uid:gid:pid: another one for each process.
        local = address.startswith(b"localhost:")
        peer = LOCAL if local else address.decode("ascii", "replace")
        self._report_refused(peer, "its key is not among those allowed")
        return [version, number, b"400", b"this key is not allowed", b"", b""]

    def _track(self, event: Any) -> None:
        """Follow connections. A failed handshake names no peer: the next event does."""
        kind: int = event["event"]
        handle: int = event["value"]
        if kind & _FAILED:
            self._handshake_failed = True
        elif kind == zmq.Event.ACCEPTED:
            local = event["endpoint"].startswith(b"ipc")
            peer = _look_up(handle, local)
            held = sum(other.held is not None for other in self._peers.values())
            if held >= HELD_CONNECTIONS:
                peer.release()
            if (former := self._peers.pop(handle, None)) is not None:
                former.release()
            self._peers[handle] = peer
            if peer.name is not None:
                self._admit(handle, peer)
        elif kind == zmq.Event.DISCONNECTED:
            peer = self._peers.pop(handle, _Peer(UNKNOWN, None))
            was_cut_off = _was_cut_off(peer)
            peer.release()
            if peer.name is not None:
                self._note_disconnection(peer)
            if self._handshake_failed:
                if self._clients is not None:
                    reason = "no client key sent, or the server key is wrong"
                    self._report_refused(peer.address, reason)
            elif was_cut_off:
                self._report_cut_off(peer.address)
            self._handshake_failed = False

    def _admit(self, handle: int, peer: _Peer) -> None:
        """Disconnect a peer whose address is blocked."""
        if not self._limits.connect(peer.address, time.monotonic()):
            self._disconnect(handle, peer)

    def _note_disconnection(self, peer: _Peer) -> None:
        """Report an address once that reconnects without end: libzmq does so when it is cut off."""
        now_s = time.monotonic()
        unstable = self._limits.disconnect(peer.address, now_s - peer.since_s, now_s)
        if self._receives == "messages":
            return
        if unstable and peer.address not in self._unstable and len(self._unstable) < MAX_ADDRESSES:
            self._unstable.add(peer.address)
            reason = "it connects again and again; is one of its subscriptions too long?"
            _logger.warning(
                "subscriber_unstable", extra=fields(address=peer.address, reason=reason)
            )

    def _report_cut_off(self, address: str) -> None:
        """Report that libzmq closed a connection, at once and then once a minute per address."""
        self.cut_off += 1
        now_s = time.monotonic()
        before_s = self._cut_off_at_s.get(address)
        if before_s is None:
            if len(self._cut_off_at_s) >= MAX_ADDRESSES:
                return
        elif now_s - before_s < CUT_OFF_REPORT_S:
            return
        self._cut_off_at_s[address] = now_s
        reason = "a message was too long or malformed"
        if self._receives == "messages":
            shown = fields(address=address, reason=reason, cut_off=self.cut_off)
            _logger.warning("publisher_cut_off", extra=shown)
        else:
            reason += "; a subscription may have 128 bytes at most"
            shown = fields(address=address, reason=reason, cut_off=self.cut_off)
            _logger.warning("subscriber_cut_off", extra=shown)

    def _check_floods(self, now_s: float) -> None:
        sent: dict[str, int] = {}
        suspects: list[tuple[int, _Peer]] = []
        for handle, peer in self._peers.items():
            if peer.name is None:
                continue
            with _connection(handle, peer.name) as connection:
                received = 0 if connection is None else _bytes_received(connection)
            count = max(received - peer.received, 0)
            peer.received += count
            sent[peer.address] = sent.get(peer.address, 0) + count
            if count > SUSPECT_BYTES:
                suspects.append((handle, peer))
        for address, count in sent.items():
            verdict = self._limits.receive(address, count, now_s)
            if verdict == "flood":
                _logger.warning("subscriber_flood", extra=fields(address=address, bytes=count))
            if verdict != "ok":
                for handle, peer in suspects:
                    if peer.address == address:
                        self._disconnect(handle, peer)

    def _disconnect(self, handle: int, peer: _Peer) -> None:
        with _connection(handle, peer.name) as connection, suppress(OSError):
            if connection is not None:
                connection.shutdown(posix_socket.SHUT_RDWR)  # libzmq notices it as a disconnect

    def _disconnect_all(self) -> None:
        for handle, peer in self._peers.items():
            self._disconnect(handle, peer)

    def _report_refused(self, address: str, reason: str) -> None:
        if address in self._refused or len(self._refused) > MAX_ADDRESSES:
            return
        self._refused.add(address)
        if len(self._refused) > MAX_ADDRESSES:
            address, reason = "others", f"more than {MAX_ADDRESSES} addresses were refused"
        shown = fields(address=address, reason=reason)
        if self._receives == "messages":
            _logger.warning("publisher_refused", extra=shown)
        else:
            _logger.warning("subscriber_refused", extra=shown)


@contextmanager
def _connection(handle: int, name: Any) -> Iterator[posix_socket.socket | None]:
    """Give access to libzmq's connection ``handle``, or None if the number is another file's now.

    Args:
        handle: a file descriptor that libzmq owns.
        name: the peer's name when it connected; None for a UNIX socket.
    """
    try:
        own = os.dup(handle)
    except OSError:
        yield None
        return
    try:
        connection = posix_socket.socket(fileno=own)
    except OSError:  # not a socket
        os.close(own)
        yield None
        return
    with connection:
        yield connection if _peer_name(connection) == name else None


def _look_up(handle: int, local: bool) -> _Peer:
    """Find out who is connected; ``local`` tells that it is an ``ipc://`` peer."""
    try:
        own = os.dup(handle)
    except OSError:
        return _Peer(LOCAL if local else UNKNOWN, None)
    try:
        connection = posix_socket.socket(fileno=own)
    except OSError:  # not a socket any more
        os.close(own)
        return _Peer(LOCAL if local else UNKNOWN, None)
    if local:
        return _Peer(LOCAL, None, held=connection)
    if (name := _peer_name(connection)) is None:
        connection.close()
        return _Peer(UNKNOWN, None)
    return _Peer(str(name[0]), name, _bytes_received(connection), held=connection)


def _was_cut_off(peer: _Peer) -> bool:
    """Tell whether this side closed a connection because of what the peer had just sent.

    libzmq also closes those of peers that do not answer heartbeats, some seconds after their last
    data, and this module those that flood; the latter are shut down, not established.
    """
    if peer.held is None:
        return False
    if peer.name is not None:
        info = _tcp_info(peer.held)
        if len(info) < _BYTES_RECEIVED + 8 or info[0] != _TCP_ESTABLISHED:
            return False
        return bool(struct.unpack_from("=I", info, _LAST_DATA_RECEIVED)[0] < RECENT_MS)
    try:  # a UNIX socket does not tell when data came
        flags = posix_socket.MSG_PEEK | posix_socket.MSG_DONTWAIT
        is_open = bool(peer.held.recv(1, flags))
    except BlockingIOError:
        is_open = True
    except OSError:
        is_open = False
    return is_open and time.monotonic() - peer.since_s < RECENT_MS / 1000


def _peer_name(connection: posix_socket.socket) -> Any:
    """Return the peer's address and port; None for a UNIX socket or one that is disconnected."""
    try:
        return connection.getpeername() or None
    except OSError:
        return None


def _bytes_received(connection: posix_socket.socket) -> int:
    """Return what a TCP peer has sent so far, bytes; 0 where the system does not say."""
    info = _tcp_info(connection)
    if len(info) < _BYTES_RECEIVED + 8:
        return 0
    return int(struct.unpack_from("=Q", info, _BYTES_RECEIVED)[0])


def _tcp_info(connection: posix_socket.socket) -> bytes:
    """Return Linux's ``struct tcp_info``; nothing where the system does not say."""
    try:
        return connection.getsockopt(posix_socket.IPPROTO_TCP, posix_socket.TCP_INFO, 256)
    except OSError:
        return b""
