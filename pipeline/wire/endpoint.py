"""Endpoints: ZeroMQ addresses, and the options that all sockets share."""

from __future__ import annotations

import errno
import ipaddress
import re
import socket as posix_socket
from pathlib import Path
from typing import Any

import zmq

from maskcast.engines.errors import InputError

HEARTBEAT_MS = 1000
"""Interval of ZMTP heartbeats."""

DEAD_AFTER_MS = 3000
"""A peer that does not answer heartbeats for this long is disconnected."""

STALLED_AFTER_MS = 10_000
"""A peer that acknowledges no data for this long is disconnected."""

LONGEST_PATH = 107
"""Bytes of a socket file's path that fit in a ``sockaddr_un``."""


def check_endpoint(endpoint: str, example: str) -> str:
    """Return an endpoint if it is valid.

    libzmq does not check: it turns port 99999 into 34463, and cuts off a path that is too long.

    Args:
        endpoint: "tcp://<host>:<port>" or "ipc://<path>".
        example: a valid one, for the error message.

    Raises:
        InputError: it is neither.
    """
    scheme, _, address = endpoint.partition("://")
    if scheme == "tcp":
        host, _, port = address.rpartition(":")
        number = 0 if port == "*" else int(port) if re.fullmatch("[0-9]{1,6}", port) else -1
        if host and 0 <= number <= 65535:
            return endpoint
    elif scheme == "ipc" and 0 < len(address.encode()) <= LONGEST_PATH:
        return endpoint
    limit = f" of at most {LONGEST_PATH} bytes" if scheme == "ipc" else ""
    raise InputError(
        f"invalid endpoint {endpoint[:200]!r}: use {example} or ipc:///path/to/socket{limit}"
    )


def reason(error: zmq.ZMQError) -> str:
    """Return what is wrong; the text of the error itself repeats the endpoint."""
    text = zmq.strerror(error.errno or 0)
    return text[:1].lower() + text[1:]


def missing_socket(endpoint: str) -> str:
    """Return that the file of an ``ipc://`` endpoint does not exist; "" if it does, and for TCP."""
    scheme, _, path = endpoint.partition("://")
    return f"there is no socket {path}" if scheme == "ipc" and not Path(path).exists() else ""


def set_common_options(socket: zmq.Socket[Any], *, linger_ms: int, max_part_bytes: int) -> None:
    """Set the options that every socket of maskcast has: heartbeats, linger and sizes.

    Args:
        socket: not bound or connected yet.
        linger_ms: how long closing waits until queued messages are sent.
        max_part_bytes: a peer that sends a longer part is disconnected.
    """
    socket.set(zmq.LINGER, linger_ms)
    socket.set(zmq.MAXMSGSIZE, max_part_bytes)
    socket.set(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
    socket.set(zmq.HEARTBEAT_TIMEOUT, DEAD_AFTER_MS)
    socket.set(zmq.HEARTBEAT_TTL, DEAD_AFTER_MS)
    socket.set(zmq.TCP_MAXRT, STALLED_AFTER_MS)


def is_loopback(endpoint: str) -> bool:
    """Whether only this machine can reach a bound endpoint, given with its numeric address."""
    scheme, _, address = endpoint.partition("://")
    if scheme == "ipc":
        return True
    host = address.rpartition(":")[0].strip("[]").partition("%")[0]
    return ipaddress.ip_address(host).is_loopback


def is_public(endpoint: str) -> bool:
    """Whether an endpoint that is not bound yet will certainly be open to other machines.

    Names of hosts and interfaces are not resolved.
    """
    scheme, _, address = endpoint.partition("://")
    host = address.rpartition(":")[0].strip("[]").partition("%")[0]
    try:
        return scheme == "tcp" and (host == "*" or not ipaddress.ip_address(host).is_loopback)
    except ValueError:
        return False


def bind(socket: zmq.Socket[Any], endpoint: str, purpose: str) -> str:
    """Bind to an endpoint and return the real one, with its numeric address and port.

    Args:
        socket: not bound yet.
        endpoint: "tcp://*:5555", "tcp://127.0.0.1:0" (a free port), "ipc:///path/to/socket".
        purpose: what the socket is for, a verb, for messages.

    Raises:
        InputError: the endpoint is invalid or in use.
    """
    in_use = InputError(
        f"{endpoint} is in use: stop the program that has it, or choose another endpoint"
    )
    check_endpoint(endpoint, "tcp://*:5555")
    scheme, _, address = endpoint.partition("://")
    # libzmq takes a socket file away from a program that still listens on it.
    if scheme == "ipc" and _listens(address):
        raise in_use
    socket.set(zmq.IPV6, int("[" in address))
    try:
        socket.bind(endpoint)
    except zmq.ZMQError as error:
        if error.errno == errno.EADDRINUSE:
            raise in_use from error
        raise InputError(
            f"cannot {purpose} on {endpoint}: {reason(error)}; use tcp://*:5555, tcp:// with an "
            "address of this machine, or ipc:///path/to/socket"
        ) from error
    return socket.get_string(zmq.LAST_ENDPOINT)


def remove_socket_file(endpoint: str) -> None:
    """Remove the file of a bound ``ipc://`` endpoint; do nothing for others."""
    scheme, _, path = endpoint.partition("://")
    if scheme == "ipc":
        Path(path).unlink(missing_ok=True)


def _listens(path: str) -> bool:
    """Whether a program accepts connections on the socket file ``path``."""
    if not Path(path).is_socket():
        return False
    with posix_socket.socket(posix_socket.AF_UNIX, posix_socket.SOCK_STREAM) as probe:
        return probe.connect_ex(path) == 0
