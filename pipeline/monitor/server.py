"""MetricsServer: ``/metrics`` for Prometheus and ``/healthz`` for whoever restarts what is ill."""

from __future__ import annotations

import errno
import logging
import socket
import socketserver
import sys
import threading
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

import msgspec
from prometheus_client import CollectorRegistry, MetricsHandler

from maskcast.engines.errors import InputError
from maskcast.pipeline.log import fields
from maskcast.pipeline.monitor.health import Health

CLIENT_TIMEOUT_S = 10.0
"""A client that neither asks nor reads for so long is disconnected."""

MOST_CLIENTS = 32
"""So many are answered at once; others are turned away, lest they take the streams' memory."""

_POLL_S = 0.1

_logger = logging.getLogger(__name__)


class MetricsServer:
    """An HTTP server on threads of its own, from when it is made until it is closed.

    Args:
        address: "127.0.0.1:9100", "[::1]:9100", "*:9100" (every interface); port 0 is a free one.
        registry: what ``/metrics`` shows.
        check: gives what ``/healthz`` says; its answer has status 200 or 503.

    Attributes:
        url: where it can be reached, with the real port.

    Raises:
        InputError: the address is none, or it is in use.
    """

    def __init__(
        self, address: str, registry: CollectorRegistry, check: Callable[[], Health]
    ) -> None:
        host, port = split_address(address)
        # "registry" is an attribute of the class that MetricsHandler reads.
        handler = type("Handler", (_Handler,), {"registry": registry, "check": staticmethod(check)})
        self._server = _bind(address, host, port, handler)
        bound, bound_port = self._server.server_address[:2]
        shown = f"[{bound!s}]" if ":" in str(bound) else str(bound)
        self.url = f"http://{shown}:{bound_port}"
        if not _is_loopback(self._server.socket):
            _logger.warning(
                "%s/metrics: everyone in the network can read it; give 127.0.0.1:%d unless "
                "Prometheus runs on another machine",
                self.url,
                bound_port,
            )
        _logger.info("metrics_served", extra=fields(url=self.url))
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(_POLL_S,), name="metrics", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Answer no more, and free the port. Closing twice is safe."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def split_address(address: str) -> tuple[str, int]:
    """Split "host:port"; the host is "" for every interface.

    Raises:
        InputError: it is not of this form.
    """
    host, colon, port = address.rpartition(":")
    bare = host.removeprefix("[").removesuffix("]")
    is_bracketed = host.startswith("[") and host.endswith("]")
    number = int(port) if port.isascii() and port.isdecimal() and len(port) < 6 else -1
    if not colon or not 0 <= number <= 65535 or (":" in bare) is not is_bracketed or "/" in bare:
        raise InputError(
            f"{address[:200]!r} is no address for metrics: use host:port, as 127.0.0.1:9100"
        )
    return ("" if bare == "*" else bare), number


class _Server(socketserver.ThreadingMixIn, socketserver.TCPServer):
    # http.server's own would ask a name server for the host's full name.
    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, address: tuple[str, int], handler: type[MetricsHandler]) -> None:
        self._places = threading.BoundedSemaphore(MOST_CLIENTS)
        super().__init__(address, handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer on a thread of its own, if there is a place."""
        if not self._places.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:  # no thread could be started
            self._places.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer, and give the place back."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Tell of an error of ours; a client that went away is none."""
        if not isinstance(sys.exception(), OSError):
            _logger.exception("a request for metrics failed")


class _ServerV6(_Server):
    address_family = socket.AF_INET6


class _Handler(MetricsHandler):
    server_version = "maskcast"
    sys_version = ""
    timeout = CLIENT_TIMEOUT_S
    check: Callable[[], Health]

    def do_GET(self) -> None:  # noqa: N802 - the name that http.server asks for
        match self.path.partition("?")[0]:
            case "/metrics":
                super().do_GET()
            case "/healthz":
                health = self.check()
                status = HTTPStatus.OK if health.healthy else HTTPStatus.SERVICE_UNAVAILABLE
                self._answer(status, "application/json", msgspec.json.encode(health) + b"\n")
            case _:
                self._answer(
                    HTTPStatus.NOT_FOUND, "text/plain", b"here are /metrics and /healthz\n"
                )

    def _answer(self, status: HTTPStatus, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def _bind(address: str, host: str, port: int, handler: type[MetricsHandler]) -> _Server:
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
            f"cannot serve metrics on {address} ({error.strerror}): use an address of this "
            "machine, as 127.0.0.1:9100"
        ) from None


def _is_loopback(bound: socket.socket) -> bool:
    host = str(bound.getsockname()[0])
    return host.startswith("127.") or host == "::1"
