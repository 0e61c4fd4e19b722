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

MAX_PATH_BYTES = 107
"""Maximum length of a socket file's path, which must fit in a ``sockaddr_un``."""


def check_endpoint(endpoint: str, example: str) -> str:
    """Return an endpoint if it is valid.

    libzmq does not check this: it turns port 99999 into 34463, and truncates a path that is too
    long.

    Args:
        endpoint: "tcp://<host>:<port>" or "ipc://<path>".
        example: a valid endpoint, for the error message.

    Raises:
        InputError: the endpoint is invalid.
    """
    scheme, _, address = endpoint.partition("://")
    if scheme == "tcp":
        host, _, port = address.rpartition(":")
        number = 0 if port == "*" else int(port) if re.fullmatch("[0-9]{1,6}", port) else -1
        if host and 0 <= number <= 65535:
            return endpoint
    elif scheme == "ipc" and 0 < len(address.encode()) <= MAX_PATH_BYTES:
        return endpoint
    limit = f" of at most {MAX_PATH_BYTES} bytes" if scheme == "ipc" else ""
    raise InputError(
        f"invalid endpoint {endpoint[:200]!r}: expected {example} or ipc:///path/to/socket{limit}"
    )


def reason(error: zmq.ZMQError) -> str:
    """Return the reason of an error without the endpoint, which the error's own text contains."""
    text = zmq.strerror(error.errno or 0)
    return text[:1].lower() + text[1:]


def missing_socket(endpoint: str) -> str:
    """Return a message if the file of an ``ipc://`` endpoint does not exist; otherwise "".

    For a ``tcp://`` endpoint the result is "".
    """
    scheme, _, path = endpoint.partition("://")
    return f"there is no socket {path}" if scheme == "ipc" and not Path(path).exists() else ""


def set_common_options(socket: zmq.Socket[Any], *, linger_ms: int, max_part_bytes: int) -> None:
    """Set the options that all sockets have in common: heartbeats, linger and sizes.

    Args:
        socket: a socket that is not bound or connected yet.
        linger_ms: maximum time for which closing the socket sends queued messages.
        max_part_bytes: maximum length of a part; a peer that sends a longer one is disconnected.
    """
    socket.set(zmq.LINGER, linger_ms)
    socket.set(zmq.MAXMSGSIZE, max_part_bytes)
    socket.set(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
    socket.set(zmq.HEARTBEAT_TIMEOUT, DEAD_AFTER_MS)
    socket.set(zmq.HEARTBEAT_TTL, DEAD_AFTER_MS)
    socket.set(zmq.TCP_MAXRT, STALLED_AFTER_MS)


def is_loopback(endpoint: str) -> bool:
    """Return whether only this machine can reach a bound endpoint, whose address is numeric."""
    scheme, _, address = endpoint.partition("://")
    if scheme == "ipc":
        return True
    host = address.rpartition(":")[0].strip("[]").partition("%")[0]
    return ipaddress.ip_address(host).is_loopback


def is_public(endpoint: str) -> bool:
    """Return whether an endpoint that is not bound yet is certainly open to other machines.

    Names of hosts and interfaces are not resolved, and give False.
    """
    scheme, _, address = endpoint.partition("://")
    host = address.rpartition(":")[0].strip("[]").partition("%")[0]
    try:
        return scheme == "tcp" and (host == "*" or not ipaddress.ip_address(host).is_loopback)
    except ValueError:
        return False


def bind(socket: zmq.Socket[Any], endpoint: str, purpose: str) -> str:
    """Bind to an endpoint and return the bound endpoint, with its numeric address and port.

    Args:
        socket: a socket that is not bound yet.
        endpoint: "tcp://*:5555", "tcp://127.0.0.1:0" (a free port) or "ipc:///path/to/socket".
        purpose: what the socket is for, a verb for error messages.

    Raises:
        InputError: the endpoint is invalid or in use.
    """
    in_use = InputError(
        f"{endpoint} is in use: stop the program that uses it, or choose another endpoint"
    )
    check_endpoint(endpoint, "tcp://*:5555")
    scheme, _, address = endpoint.partition("://")
    # libzmq would replace the socket file of a program that still listens on it.
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
    """Return whether a program accepts connections on the socket file ``path``."""
    if not Path(path).is_socket():
        return False
    with posix_socket.socket(posix_socket.AF_UNIX, posix_socket.SOCK_STREAM) as probe:
        return probe.connect_ex(path) == 0
