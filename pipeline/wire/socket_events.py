"""Socket events: the reports of a ZeroMQ socket's monitor about its connections.

pyzmq also has a function for this, but its module loads asyncio and TLS: 7 MB in every process.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import zmq

_HEAD = struct.Struct("=Hi")


class SocketEvent(NamedTuple):
    """An event of a connection.

    Attributes:
        kind: one of ``zmq.Event``.
        value: a file descriptor, an error number or an interval, depending on the kind.
        endpoint: the socket's endpoint.
    """

    kind: int
    value: int
    endpoint: bytes


def receive_event(monitor: zmq.Socket[bytes]) -> SocketEvent:
    """Receive the next event of a monitor (``zmq_socket_monitor``)."""
    head, endpoint = monitor.recv_multipart()
    kind, value = _HEAD.unpack(head)
    return SocketEvent(kind, value, endpoint)
