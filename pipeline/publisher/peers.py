"""PeerGuard: authenticates the clients of a bound socket, and disconnects peers that flood it."""

from __future__ import annotations

import logging
import queue
import socket as posix_socket
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from typing import Literal

import zmq
from zmq.utils import z85

from maskcast.pipeline.log import fields
from maskcast.pipeline.publisher.grants import Grants
from maskcast.pipeline.publisher.limits import AddressLimits
from maskcast.pipeline.publisher.peer import (
    LOCAL,
    UNKNOWN,
    Peer,
    bytes_received,
    connection_of,
    look_up,
    was_cut_off,
)
from maskcast.pipeline.wire.rights import ClientRights
from maskcast.pipeline.wire.server_keys import AllowedClients, ServerKeys
from maskcast.pipeline.wire.socket_events import SocketEvent, receive_event

MAX_ADDRESSES = 256
"""Maximum number of addresses reported by name, so that unknown clients cannot fill the log."""

FLOOD_CHECK_S = 0.1
"""Interval at which the bytes received from up to 100 peers are checked."""

SUSPECT_BYTES = 4096
"""Peers of a flooding address that sent more than this since the last check are disconnected."""

KEYS_CHECK_S = 0.5
"""Interval at which the files of the allowed clients are checked."""

HELD_CONNECTIONS = 128
"""Maximum number of connections with a second file descriptor, which shows which side closed the
connection. For further connections this is not known."""

CUT_OFF_REPORT_S = 60.0
"""An address whose peers are cut off repeatedly is reported at most once in this time."""

_ZAP = "inproc://zeromq.zap.01"
_MONITOR = "inproc://maskcast.monitor"
# NO_DETAIL: a client may disconnect as soon as it learns that the server uses keys.
_FAILED = zmq.Event.HANDSHAKE_FAILED_PROTOCOL | zmq.Event.HANDSHAKE_FAILED_NO_DETAIL
_EVENTS = zmq.Event.ACCEPTED | zmq.Event.DISCONNECTED | _FAILED

_logger = logging.getLogger(__name__)


class PeerGuard:
    """Guards a socket on its own thread.

    With keys it secures the socket with CURVE (RFC 26) and answers libzmq's requests to
    authenticate clients (ZAP, RFC 27), so that handshakes and frames never wait for each other. The
    keys and rights of the allowed clients are read again when their files change. A subscriber
    whose key was withdrawn, or whose rights have changed, is disconnected. On sockets for other
    purposes, all peers are disconnected when a key is withdrawn, and those still allowed reconnect.

    With or without keys, a TCP peer that sends more than subscribers ever need is disconnected, and
    its address is blocked for a while (``AddressLimits``): libzmq queues subscriptions without a
    limit, and each takes about five times its size.

    libzmq silently closes the connection of a peer that sends a message longer than ``MAXMSGSIZE``,
    such as a subscription that is too long. The peer may reconnect without that subscription and
    never receive anything. This is logged (``subscriber_cut_off``).

    The thread ends when the socket's context is terminated.

    Args:
        socket: a socket that is not bound yet.
        keys: the server's own, and those of its clients; None for no encryption.
        receives: what the socket receives: "requests", whose bytes are limited, or publishers'
            "messages", whose bytes are not.

    Attributes:
        grants: the granted subscriptions of each connection; the user of the guard adds them.
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
        self._subscribes = keys is not None and keys.purpose == "subscribe"
        self._refused: set[str] = set()
        self._unstable: set[str] = set()
        self._cut_off_at_s: dict[str, float] = {}
        self.cut_off = 0
        self.grants = Grants()
        self._to_disconnect: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._limits = AddressLimits()
        self._peers: dict[int, Peer] = {}
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
        """Number of open connections; some may still be in their handshake."""
        return len(self._peers)

    def rights(self, key: bytes) -> ClientRights | None:
        """Return the current rights of a client; None if it is not allowed. Thread-safe."""
        return None if self._clients is None else self._clients.rights.get(key)

    def disconnect(self, handles: Iterable[int]) -> None:
        """Schedule peers to be disconnected, by the file descriptor of each. Thread-safe."""
        for handle in handles:
            self._to_disconnect.put(handle)

    def join(self) -> None:
        """Wait for the thread to end. Terminate the context first."""
        self._thread.join()

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._monitor, zmq.POLLIN)
        if self._zap is not None:
            poller.register(self._zap, zmq.POLLIN)
        flood_at_s = keys_at_s = time.monotonic()
        try:
            while True:
                ready = dict(poller.poll(self._interval_ms()))
                # Before the ZAP requests: a connection must be known when its client is admitted.
                while self._monitor.poll(0):
                    self._track(receive_event(self._monitor))
                if self._zap is not None and self._zap in ready:
                    self._zap.send_multipart(self._reply(self._zap.recv_multipart()))
                while not self._to_disconnect.empty():
                    self._disconnect_handle(self._to_disconnect.get())
                now_s = time.monotonic()
                if self._is_flood_check_due(now_s - flood_at_s):
                    self._check_floods(now_s)
                    flood_at_s = now_s
                if self._clients is not None and now_s - keys_at_s >= KEYS_CHECK_S:
                    keys_at_s = now_s
                    self._apply(self._clients.reload())
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
        # The bytes of local peers are not counted.
        is_remote = any(peer.name is not None for peer in self._peers.values())
        if is_remote and self._receives == "requests":
            return int(FLOOD_CHECK_S * 1000)
        return None if self._clients is None else int(KEYS_CHECK_S * 1000)

    def _reply(self, request: list[bytes]) -> list[bytes]:
        """Answer a ZAP request: version, id, domain, address, identity, mechanism, credentials."""
        version, number, _, address, _, mechanism, *credentials = request
        if (
            self._clients is not None
            and mechanism == b"CURVE"
            and (key := z85.encode(credentials[0])) in self._clients.rights
        ):
            return [version, number, b"200", b"OK", key, b""]
        # The address of an ipc:// peer is localhost:uid:gid:pid, which differs for each process.
        local = address.startswith(b"localhost:")
        peer = LOCAL if local else address.decode("ascii", "replace")
        self._report_refused(peer, "its key is not among those allowed")
        return [version, number, b"400", b"this key is not allowed", b"", b""]

    def _track(self, event: SocketEvent) -> None:
        """Track connections. A failed handshake does not name the peer; the next event does."""
        kind, handle = event.kind, event.value
        if kind & _FAILED:
            self._handshake_failed = True
        elif kind == zmq.Event.ACCEPTED:
            local = event.endpoint.startswith(b"ipc")
            peer = look_up(handle, local)
            held = sum(other.held is not None for other in self._peers.values())
            if held >= HELD_CONNECTIONS:
                peer.release()
            if (former := self._peers.pop(handle, None)) is not None:
                former.release()
            self._peers[handle] = peer
            self.grants.open(handle)
            if peer.name is not None:
                self._admit(handle, peer)
        elif kind == zmq.Event.DISCONNECTED:
            peer = self._peers.pop(handle, Peer(UNKNOWN, None))
            self.grants.close(handle)
            is_cut_off = was_cut_off(peer, handle)
            peer.release()
            if peer.name is not None:
                self._note_disconnection(peer)
            if self._handshake_failed:
                if self._clients is not None:
                    reason = "no client key sent, or the server key is wrong"
                    self._report_refused(peer.address, reason)
            elif is_cut_off:
                self._report_cut_off(peer.address)
            self._handshake_failed = False

    def _admit(self, handle: int, peer: Peer) -> None:
        """Disconnect a peer whose address is blocked."""
        if not self._limits.connect(peer.address, time.monotonic()):
            self._disconnect(handle, peer)

    def _note_disconnection(self, peer: Peer) -> None:
        """Report once that an address keeps reconnecting, as libzmq does when it is cut off."""
        now_s = time.monotonic()
        unstable = self._limits.disconnect(peer.address, now_s - peer.since_s, now_s)
        if self._receives == "messages":
            return
        if unstable and peer.address not in self._unstable and len(self._unstable) < MAX_ADDRESSES:
            self._unstable.add(peer.address)
            reason = "it keeps reconnecting; check that its subscriptions are not too long"
            _logger.warning(
                "subscriber_unstable", extra=fields(address=peer.address, reason=reason)
            )

    def _report_cut_off(self, address: str) -> None:
        """Report that libzmq closed a connection: immediately, then once a minute per address."""
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
            reason += "; a subscription has at most 128 bytes"
            shown = fields(address=address, reason=reason, cut_off=self.cut_off)
            _logger.warning("subscriber_cut_off", extra=shown)

    def _check_floods(self, now_s: float) -> None:
        sent: dict[str, int] = {}
        suspects: list[tuple[int, Peer]] = []
        for handle, peer in self._peers.items():
            if peer.name is None:
                continue
            with connection_of(handle, peer.name) as connection:
                received = 0 if connection is None else bytes_received(connection)
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

    def _disconnect(self, handle: int, peer: Peer) -> None:
        with connection_of(handle, peer.name) as connection, suppress(OSError):
            if connection is not None:
                connection.shutdown(posix_socket.SHUT_RDWR)  # libzmq sees a disconnection

    def _disconnect_handle(self, handle: int) -> None:
        if (peer := self._peers.get(handle)) is not None:
            self._disconnect(handle, peer)

    def _apply(self, changed: frozenset[bytes]) -> None:
        """Disconnect clients whose keys were withdrawn or whose rights have changed."""
        if changed and self._subscribes:
            for handle in self.grants.handles(changed):
                self._disconnect_handle(handle)
        elif self._clients is not None and changed - self._clients.rights.keys():
            for handle in list(self._peers):
                self._disconnect_handle(handle)

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
