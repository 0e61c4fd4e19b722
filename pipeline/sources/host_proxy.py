"""HostProxy: confines FFmpeg's HTTP requests for one source to the host of its URL."""

from __future__ import annotations

import logging
import os
import re
import selectors
import socket
import threading
from contextlib import suppress
from urllib.parse import urlsplit

from maskcast.engines.errors import InputError
from maskcast.pipeline.log import fields
from maskcast.pipeline.url import host_and_port, redact

MAX_HEAD_BYTES = 64 << 10
"""Maximum size of a request's head; FFmpeg's has about 200 bytes."""

_READ_BYTES = 64 << 10

_logger = logging.getLogger(__name__)


class HostProxy:
    """An HTTP proxy on loopback that connects to one host only.

    FFmpeg follows redirects and playlist segments to any host. It has no option to prevent that,
    but it sends every request of a source through a proxy if one is configured: absolute URLs for
    http, CONNECT for https. Each connection carries one request, so that every request is checked.

    Args:
        url: the source; only its host may be reached, on any port.
        source: the source's name, for the log.
        timeout_s: maximum wait for the request, for a connection to the host and for a send.

    Attributes:
        url: the proxy's own URL.
        refused_host: the last other host that FFmpeg requested; "" if there was none.

    Raises:
        InputError: FFmpeg would not use the proxy, or no port is free for it.
    """

    def __init__(self, url: str, source: str, timeout_s: float) -> None:
        if os.environ.get("no_proxy"):
            raise InputError(
                f"{redact(url)}: cannot be confined to its host, because FFmpeg reads the variable "
                "no_proxy; start the program without it"
            )
        self.refused_host = ""
        self._host = _normalize(host_and_port(url)[0])
        self._source = source
        self._timeout_s = timeout_s
        try:
            self._listener = socket.create_server(("127.0.0.1", 0))
        except OSError as error:
            raise InputError(
                f"{redact(url)}: cannot open a port for its proxy: {error.strerror}"
            ) from None
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._accept, name=f"proxy {source}", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Accept no more connections. Open ones last until FFmpeg or the host closes them."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        """Answer one request."""
        with client, suppress(OSError, ValueError, UnicodeError):
            client.settimeout(self._timeout_s)
            method, target, head, rest = _read_head(client)
            parts = urlsplit(f"//{target}" if method == "CONNECT" else target)
            host = parts.hostname or ""
            if _normalize(host) != self._host or (method != "CONNECT" and parts.scheme != "http"):
                self._refuse(host)
                client.sendall(b"HTTP/1.1 403 Forbidden\r\nConnection: close\r\n\r\n")
                return
            address = host, parts.port or 80
            try:
                server = socket.create_connection(address, self._timeout_s)
            except OSError:
                client.sendall(b"HTTP/1.1 502 Bad Gateway\r\nConnection: close\r\n\r\n")
                return
            with server:
                if method == "CONNECT":
                    client.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
                    server.sendall(rest)
                    self._relay({client: server, server: client})
                else:
                    # Leading slashes are merged: a server may read "//host" as another host.
                    origin = re.search(r"://[^/?#]*/*", target)
                    path = "/" + target[origin.end() :] if origin else "/"
                    server.sendall(f"{method} {path} HTTP/1.1\r\n".encode() + head)
                    self._relay({server: client, client: None})

    def _relay(self, routes: dict[socket.socket, socket.socket | None]) -> None:
        """Forward data along the routes until one side closes; discard data routed to None."""
        with selectors.DefaultSelector() as selector:  # select() takes no descriptor above 1023
            for origin, destination in routes.items():
                selector.register(origin, selectors.EVENT_READ, (origin, destination))
            while True:
                for key, _ in selector.select():
                    origin, destination = key.data
                    if not (data := origin.recv(_READ_BYTES)):
                        return
                    if destination is not None:
                        destination.sendall(data)

    def _refuse(self, host: str) -> None:
        if host != self.refused_host:
            shown = fields(source=self._source, host=host, allowed=self._host)
            _logger.warning("source_host_refused", extra=shown)
        self.refused_host = host


def _read_head(client: socket.socket) -> tuple[str, str, bytes, bytes]:
    """Return a request's method, its target, its header lines and any bytes after them.

    The header lines are changed to ask the server to close the connection after its response.
    """
    data = b""
    while b"\r\n\r\n" not in data:
        if not (more := client.recv(_READ_BYTES)) or len(data) > MAX_HEAD_BYTES:
            raise ValueError("no request")
        data += more
    head, _, rest = data.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    method, target, _ = first.split(" ")
    kept = [line for line in lines if not line.lower().startswith(("connection:", "proxy-"))]
    changed = "\r\n".join([*kept, "Connection: close", "", ""])
    return method, target, changed.encode("latin-1"), rest


def _normalize(host: str) -> str:
    return host.strip("[]").rstrip(".").lower()
