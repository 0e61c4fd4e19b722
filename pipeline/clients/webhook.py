"""Webhook: posts events to an HTTP server as signed JSON, with retries and a bounded queue."""

from __future__ import annotations

import hashlib
import hmac
import http.client
import logging
import random
import re
import threading
import time
import uuid
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec

from maskcast.engines.errors import InputError
from maskcast.pipeline.log import fields
from maskcast.pipeline.subscriber.received import StreamEvent
from maskcast.pipeline.subscriber.subscribe import subscribe
from maskcast.pipeline.url import redact

EVENTS = ("zone_entered", "zone_left", "line_crossed", "track_ended", "state", "ended")
"""Events that are posted by default."""

MAX_QUEUED = 1000
"""Maximum number of events that wait for the server; then the oldest is lost."""

FIRST_RETRY_S, LAST_RETRY_S = 0.5, 60.0
"""Delay before a retry: it doubles from the first to the second, and is shortened at random."""

TIMEOUT_S = 10.0

_RETRIED = (408, 425, 429)
"""Client errors that are retried, as server errors are."""

_URL = re.compile("[!-~]+")
"""Printable ASCII: http.client sends nothing else."""

_logger = logging.getLogger(__name__)


class Webhook:
    """Posts events in order, on a thread of its own. A context manager.

    Args:
        url: "https://host/path" or "http://host/path".
        secret: signs each request; None for no signature.

    Attributes:
        delivered: number of events that the server accepted.
        lost: number of events that it rejected, or that did not fit into the queue.

    Raises:
        InputError: the URL is not an HTTP URL.
    """

    def __init__(self, url: str, secret: str | None) -> None:
        try:
            parts = urlsplit(url)
            is_valid = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
            (parts.hostname or "").encode("idna")  # as a connection does
        except ValueError:  # an invalid host or port
            is_valid = False
        if not (is_valid and _URL.fullmatch(url)):
            raise InputError(
                f"webhook {redact(url)!r}: expected https://HOST/PATH; percent-encode spaces and "
                "non-ASCII characters"
            )
        if parts.username or parts.password:
            raise InputError("webhook: the URL has a password; sign requests with a secret instead")
        self._url, self._parts = redact(url), parts
        self._secret = secret
        self._queue: deque[tuple[str, bytes]] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self.delivered = self.lost = 0
        self._thread = threading.Thread(target=self._run, name="webhook", daemon=True)

    def __enter__(self) -> Webhook:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop; events that are not delivered yet are lost."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(2 * TIMEOUT_S)
        if self._queue:
            self._lose(len(self._queue), "stopped")

    def post(self, event: StreamEvent) -> None:
        """Queue an event, without waiting for the server."""
        body = msgspec.json.encode(
            {
                "source": event.source,
                "event": event.name,
                "time_ns": event.data.get("capture_ns", event.publish_ns),
                "publisher": event.publisher,
                "data": event.data,
            }
        )
        with self._changed:
            if len(self._queue) >= MAX_QUEUED:
                self._queue.popleft()
                self._lose(1, "the queue is full")
            self._queue.append((uuid.uuid4().hex, body))
            self._changed.notify_all()

    def _run(self) -> None:
        delay_s = FIRST_RETRY_S
        while True:
            with self._changed:
                while not self._queue and not self._closed:
                    self._changed.wait()
                if self._closed:
                    return
                delivery, body = item = self._queue[0]
            problem, is_final = self._send(delivery, body)
            with self._changed:
                if not problem or is_final:
                    if self._queue and self._queue[0] is item:
                        self._queue.popleft()
                    delay_s = FIRST_RETRY_S
                    if problem:
                        self._lose(1, problem)
                    else:
                        self.delivered += 1
                    continue
                shown = fields(url=self._url, reason=problem, retry_s=round(delay_s, 1))
                _logger.warning("webhook_failed", extra=shown)
                until_s = time.monotonic() + random.uniform(delay_s / 2, delay_s)
                while not self._closed and (left_s := until_s - time.monotonic()) > 0:
                    self._changed.wait(left_s)
                delay_s = min(2 * delay_s, LAST_RETRY_S)

    def _send(self, delivery: str, body: bytes) -> tuple[str, bool]:
        """Post once; return the problem ("" if there is none), and whether a retry is useless."""
        headers = {"Content-Type": "application/json", "Maskcast-Delivery": delivery}
        if self._secret is not None:
            stamp = str(int(time.time()))
            headers["Maskcast-Timestamp"] = stamp
            headers["Maskcast-Signature"] = sign(self._secret, stamp, body)
        kind = (
            http.client.HTTPSConnection
            if self._parts.scheme == "https"
            else http.client.HTTPConnection
        )
        assert self._parts.hostname is not None
        connection = kind(self._parts.hostname, self._parts.port, timeout=TIMEOUT_S)
        path = self._parts.path or "/"
        try:
            query = f"?{self._parts.query}" if self._parts.query else ""
            connection.request("POST", path + query, body, headers)
            status = connection.getresponse().status
        except (OSError, http.client.HTTPException) as error:
            return str(error) or type(error).__name__, False
        finally:
            connection.close()
        if 200 <= status < 300:
            return "", True
        return f"HTTP status {status}", status < 500 and status not in _RETRIED

    def _lose(self, count: int, reason: str) -> None:
        self.lost += count
        shown = fields(url=self._url, reason=reason, lost=self.lost)
        _logger.warning("webhook_event_lost", extra=shown)


def sign(secret: str, timestamp: str, body: bytes) -> str:
    """Return "sha256=" and the HMAC-SHA256 of the timestamp, a dot and the body, in hexadecimal."""
    message = timestamp.encode() + b"." + body
    return "sha256=" + hmac.new(secret.encode(), message, hashlib.sha256).hexdigest()


def run_webhook(
    endpoint: str,
    url: str,
    *,
    sources: Sequence[str] | None = None,
    events: Sequence[str] = EVENTS,
    secret: str | None = None,
    server_key: str | Path | None = None,
    client_key: str | Path | None = None,
) -> None:
    """Post a publisher's events until an exception is raised; reconnect to both sides.

    Raises:
        InputError: the endpoint or the URL is wrong.
    """
    arguments: dict[str, Any] = {"server_key": server_key, "client_key": client_key}
    with (
        Webhook(url, secret) as webhook,
        subscribe(
            endpoint, sources, events=True, policy="all", until_ended=False, **arguments
        ) as received,
    ):
        while True:
            try:
                item = received.receive(3600)
            except TimeoutError:
                continue
            if isinstance(item, StreamEvent) and item.name in events:
                webhook.post(item)
