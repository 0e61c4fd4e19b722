"""Addresses of HTTP servers: HOST:PORT."""

from __future__ import annotations

import ipaddress

from maskcast.engines.errors import InputError


def split_address(address: str, purpose: str, example: str) -> tuple[str, int]:
    """Split "host:port"; the host is "" for every interface.

    Args:
        address: "127.0.0.1:9100", "[::1]:9100", "*:9100" (every interface).
        purpose: what is served there, for the error message.
        example: a valid address, for the error message.

    Raises:
        InputError: the address does not have this form.
    """
    host, colon, port = address.rpartition(":")
    bare = host.removeprefix("[").removesuffix("]")
    is_bracketed = host.startswith("[") and host.endswith("]")
    number = int(port) if port.isascii() and port.isdecimal() and len(port) < 6 else -1
    if not colon or not 0 <= number <= 65535 or (":" in bare) is not is_bracketed or "/" in bare:
        raise InputError(
            f"invalid address for {purpose} {address[:200]!r}: use HOST:PORT, for example {example}"
        )
    return ("" if bare == "*" else bare), number


def is_loopback_host(host: str) -> bool:
    """Whether only this machine can reach a server at ``host``, a name or a numeric address."""
    try:
        return ipaddress.ip_address(host.strip("[]").partition("%")[0]).is_loopback
    except ValueError:
        return host.lower() == "localhost"
