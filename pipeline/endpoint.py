"""Endpoints: where publishers and subscribers meet."""

from __future__ import annotations

import ipaddress
import re

from engines.errors import InputError

HEARTBEAT_MS = 1000
"""How often a peer is asked whether it is still there."""

DEAD_AFTER_MS = 3000
"""A peer that does not answer for so long is disconnected."""

STALLED_AFTER_MS = 10_000
"""A peer that takes in nothing of what is sent to it for so long is disconnected."""

LONGEST_PATH = 107
"""Bytes of a socket file's path that fit in a ``sockaddr_un``."""


def check_endpoint(endpoint: str, example: str) -> str:
    """Return an endpoint if ZeroMQ will understand it.

    libzmq takes a port of 99999 for 34463, and cuts off a path that is too long.

    Args:
        endpoint: "tcp://<host>:<port>" or "ipc://<path>".
        example: one that would do, for the message.

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
    raise InputError(f"{endpoint[:200]!r} is no endpoint: use {example} or ipc:///path/to/socket")


def is_loopback(endpoint: str) -> bool:
    """Whether only this machine can reach a bound endpoint, given with its numeric address."""
    scheme, _, address = endpoint.partition("://")
    if scheme == "ipc":
        return True
    host = address.rpartition(":")[0].strip("[]").partition("%")[0]
    return ipaddress.ip_address(host).is_loopback
