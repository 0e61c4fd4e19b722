"""Listener: the socket on which the page is served."""

from __future__ import annotations

import errno
import socket

from maskcast.engines.errors import InputError
from maskcast.pipeline.address import split_address
from maskcast.pipeline.clients.view.access import Access


class Listener:
    """A listening socket, and who may connect to it.

    Args:
        address: "127.0.0.1:8080"; port 0 for a free one.
        token: what browsers must send; None is possible on loopback only.
        bound: a socket that already listens at the address; None opens one.

    Attributes:
        access: who may connect.
        socket: the socket.
        url: the page's URL, with the actual port and without the token.

    Raises:
        InputError: the address is invalid or in use, or needs a token.
    """

    def __init__(
        self, address: str, token: str | None = None, bound: socket.socket | None = None
    ) -> None:
        host, port = split_address(address, "the view", "127.0.0.1:8080")
        self.access = Access(host, token)
        self.socket = _listen(host, port) if bound is None else bound
        shown = socket.gethostname() if host in ("", "0.0.0.0", "::") else host
        shown = f"[{shown}]" if ":" in shown else shown
        self.url = f"http://{shown}:{self.socket.getsockname()[1]}/"


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=128)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise InputError(
                f"{host or '*'}:{port} is in use: stop the program that serves there, or choose "
                "another port for the view"
            ) from None
        raise InputError(
            f"cannot serve the view on {host or '*'}:{port}: {error.strerror}; use an address of "
            "this machine, for example 127.0.0.1:8080"
        ) from None
