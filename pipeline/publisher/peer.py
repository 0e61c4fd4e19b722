"""Peer: a connection of a bound socket, and what the operating system reports about it."""

from __future__ import annotations

import os
import socket as posix_socket
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

RECENT_MS = 1000
"""A connection that is closed within this time after data arrived was closed because of the data;
a failed heartbeat takes longer."""

CLOSED_WITHIN_S = 0.1
"""Time within which libzmq closes a connection after it has reported the disconnection."""

LOCAL, UNKNOWN = "this machine", "an unknown address"
"""The address of an ``ipc://`` peer, and of one that was gone before it could be looked up."""

_BYTES_RECEIVED = 128
_LAST_DATA_RECEIVED = 52
"""Offsets of ``tcpi_bytes_received`` and ``tcpi_last_data_recv`` (milliseconds ago) in Linux's
``struct tcp_info`` (since 4.1); its first byte is the state."""

_TCP_ESTABLISHED = 1


@dataclass(slots=True)
class Peer:
    """A connection to a peer.

    Attributes:
        address: the peer's address.
        name: its address and port, as ``getpeername`` returns them; None if it is not TCP.
        received: bytes received so far.
        since_s: when it began, monotonic seconds.
        held: a second descriptor of the connection. After libzmq has closed its own, it shows which
            side ended the connection. None if there is none.
    """

    address: str
    name: Any
    received: int = 0
    since_s: float = field(default_factory=time.monotonic)
    held: posix_socket.socket | None = None

    def release(self) -> None:
        """Close the second descriptor."""
        if self.held is not None:
            self.held.close()
            self.held = None


@contextmanager
def connection_of(handle: int, name: Any) -> Iterator[posix_socket.socket | None]:
    """Yield libzmq's connection ``handle``; None if the number now belongs to another file.

    Args:
        handle: a file descriptor that libzmq owns.
        name: the peer's name when it connected; None for a UNIX socket.
    """
    connection = _duplicate(handle)
    if connection is None:
        yield None
        return
    with connection:
        yield connection if _peer_name(connection) == name else None


def look_up(handle: int, local: bool) -> Peer:
    """Return the peer of a connection.

    Args:
        handle: a file descriptor that libzmq owns.
        local: whether it is an ``ipc://`` peer.
    """
    connection = _duplicate(handle)
    if connection is None:
        return Peer(LOCAL if local else UNKNOWN, None)
    if local:
        return Peer(LOCAL, None, held=connection)
    if (name := _peer_name(connection)) is None:
        connection.close()
        return Peer(UNKNOWN, None)
    return Peer(str(name[0]), name, bytes_received(connection), held=connection)


def _duplicate(handle: int) -> posix_socket.socket | None:
    """Return a second descriptor of libzmq's connection; None if it is gone."""
    try:
        own = os.dup(handle)
    except OSError:
        return None
    try:
        return posix_socket.socket(fileno=own)
    except OSError:  # not a socket any more
        os.close(own)
        return None


def was_cut_off(peer: Peer, handle: int) -> bool:
    """Return whether libzmq closed a connection because of what the peer had just sent.

    libzmq also closes a connection if the peer does not answer heartbeats, but that is some seconds
    after the last data. A flooding peer's connection, which ``PeerGuard`` has shut down, is no
    longer in the TCP state ``ESTABLISHED``.

    Args:
        peer: the peer whose disconnection was reported.
        handle: the file descriptor that libzmq had for its connection.
    """
    return peer.held is not None and _is_cut_off(peer, peer.held) and _closes(handle, peer.held)


def _is_cut_off(peer: Peer, held: posix_socket.socket) -> bool:
    if peer.name is not None:
        info = _tcp_info(held)
        if len(info) < _BYTES_RECEIVED + 8 or info[0] != _TCP_ESTABLISHED:
            return False
        return bool(struct.unpack_from("=I", info, _LAST_DATA_RECEIVED)[0] < RECENT_MS)
    try:  # a UNIX socket does not report when data arrived
        flags = posix_socket.MSG_PEEK | posix_socket.MSG_DONTWAIT
        is_open = bool(held.recv(1, flags))
    except BlockingIOError:
        is_open = True
    except OSError:
        is_open = False
    return is_open and time.monotonic() - peer.since_s < RECENT_MS / 1000


def _closes(handle: int, held: posix_socket.socket) -> bool:
    """Return whether ``handle`` is no longer the held connection.

    libzmq reports a disconnection just before it closes the connection. If the descriptor stays
    open, it belongs to a later connection that reuses the number of one that had ended before it
    was looked up.
    """
    end_s = time.monotonic() + CLOSED_WITHIN_S
    while time.monotonic() < end_s:
        try:
            if not os.path.sameopenfile(handle, held.fileno()):
                return True
        except OSError:
            return True
        time.sleep(0.001)
    return False


def _peer_name(connection: posix_socket.socket) -> Any:
    """Return the peer's address and port; None for a UNIX socket or one that is disconnected."""
    try:
        return connection.getpeername() or None
    except OSError:
        return None


def bytes_received(connection: posix_socket.socket) -> int:
    """Return how many bytes a TCP peer has sent so far; 0 where the system does not report it."""
    info = _tcp_info(connection)
    if len(info) < _BYTES_RECEIVED + 8:
        return 0
    return int(struct.unpack_from("=Q", info, _BYTES_RECEIVED)[0])


def _tcp_info(connection: posix_socket.socket) -> bytes:
    """Return Linux's ``struct tcp_info``; no bytes if the system does not provide it."""
    try:
        return connection.getsockopt(posix_socket.IPPROTO_TCP, posix_socket.TCP_INFO, 256)
    except OSError:
        return b""
