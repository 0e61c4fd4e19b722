"""MetricsServer: ``/metrics`` for Prometheus and ``/healthz`` for a service manager, over HTTP."""

from __future__ import annotations

import errno
import logging
import socket
import socketserver
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from http import HTTPStatus
from typing import Any

import msgspec
from prometheus_client import CollectorRegistry, MetricsHandler

from maskcast.engines.errors import InputError
from maskcast.pipeline.address import is_loopback_host, split_address
from maskcast.pipeline.log import fields
from maskcast.pipeline.monitor.health import Health

DEADLINE_S = 10.0
"""Maximum time for a request and its answer, seconds; then the client is disconnected."""

MAX_CLIENTS = 32
"""Maximum number of connected clients. One more disconnects the client that has been connected
longest. A normal client needs milliseconds, so it is answered even if all others are slow."""

_POLL_S = 0.1

_logger = logging.getLogger(__name__)


class MetricsServer:
    """An HTTP server on its own threads, from its construction until ``close``.

    Args:
        address: "127.0.0.1:9100", "[::1]:9100", "*:9100" (every interface); port 0 for a free one.
        registry: the metrics that ``/metrics`` shows.
        check: returns the health that ``/healthz`` reports, with status 200 or 503.

    Attributes:
        url: the server's URL, with the actual port.

    Raises:
        InputError: the address is invalid or in use.
    """

    def __init__(
        self, address: str, registry: CollectorRegistry, check: Callable[[], Health]
    ) -> None:
        # "registry" is an attribute of the class that MetricsHandler reads.
        handler = type("Handler", (_Handler,), {"registry": registry, "check": staticmethod(check)})
        self._server = _bind(address, handler)
        host, port = self._server.server_address[:2]
        self.url = f"http://[{host!s}]:{port}" if ":" in str(host) else f"http://{host!s}:{port}"
        if not is_loopback_host(str(host)):
            advice = f"anyone on the network can read this; use 127.0.0.1:{port} unless needed"
            _logger.warning("metrics_public", extra=fields(url=self.url, advice=advice))
        _logger.info("metrics_served", extra=fields(url=self.url))
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(_POLL_S,), name="metrics", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Stop serving and free the port. Closing twice is safe."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class _Server(socketserver.ThreadingTCPServer):
    # http.server's own server would ask a name server for the host's full name.
    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], handler: type[MetricsHandler]) -> None:
        self._lock = threading.Lock()
        self._clients: dict[Any, float] = {}  # connections, the oldest first, and their start
        super().__init__(address, handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer on a new thread; disconnect the oldest client if there are too many."""
        with self._lock:
            if len(self._clients) >= MAX_CLIENTS:
                self._disconnect(next(iter(self._clients)))
            self._clients[request] = time.monotonic()
        super().process_request(request, client_address)

    def service_actions(self) -> None:
        """Disconnect clients at their deadline; ``serve_forever`` calls this periodically."""
        with self._lock:
            late_s = time.monotonic() - DEADLINE_S
            for request in [one for one, since_s in self._clients.items() if since_s < late_s]:
                self._disconnect(request)

    def shutdown_request(self, request: Any) -> None:
        """Close a connection after its answer or an error."""
        with self._lock:
            self._clients.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log an unexpected error; a disconnected client is expected."""
        if not isinstance(sys.exception(), OSError):
            _logger.exception("metrics_request_failed")

    def _disconnect(self, request: Any) -> None:
        """Shut a connection down; the client's thread then closes the socket."""
        del self._clients[request]
        with suppress(OSError):
            request.shutdown(socket.SHUT_RDWR)


class _ServerV6(_Server):
    address_family = socket.AF_INET6


class _Handler(MetricsHandler):
    server_version = "maskcast"
    sys_version = ""
    check: Callable[[], Health]

    def do_GET(self) -> None:  # noqa: N802 - the name that http.server calls
        match self.path.partition("?")[0]:
            case "/metrics":
                super().do_GET()
            case "/healthz":
                health = self.check()
                status = HTTPStatus.OK if health.healthy else HTTPStatus.SERVICE_UNAVAILABLE
                self._answer(status, "application/json", msgspec.json.encode(health) + b"\n")
            case _:
                self._answer(HTTPStatus.NOT_FOUND, "text/plain", b"see /metrics and /healthz\n")

    def _answer(self, status: HTTPStatus, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def _bind(address: str, handler: type[MetricsHandler]) -> _Server:
    host, port = split_address(address, "metrics", "127.0.0.1:9100")
    server = _ServerV6 if ":" in host else _Server
    try:
        return server((host, port), handler)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise InputError(
                f"{address} is in use: stop the program that serves there, or choose another "
                "port for the metrics"
            ) from None
        raise InputError(
            f"cannot serve metrics on {address}: {error.strerror}; use an address of this "
            "machine, for example 127.0.0.1:9100"
        ) from None
