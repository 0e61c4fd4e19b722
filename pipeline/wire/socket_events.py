"""Socket events: what the monitor of a ZeroMQ socket reports of its connections.

pyzmq has a function for this, too, whose module loads asyncio and TLS: 7 MB in every process.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import zmq

_HEAD = struct.Struct("=Hi")


class SocketEvent(NamedTuple):
    """What happened to a connection.

    Attributes:
        kind: one of ``zmq.Event``.
        value: a file descriptor, an error number or an interval, depending on the kind.
        endpoint: of the socket.
    """

    kind: int
    value: int
    endpoint: bytes


def receive_event(monitor: zmq.Socket[bytes]) -> SocketEvent:
    """Receive the next event of a monitor (``zmq_socket_monitor``)."""
    head, endpoint = monitor.recv_multipart()
    kind, value = _HEAD.unpack(head)
    return SocketEvent(kind, value, endpoint)
