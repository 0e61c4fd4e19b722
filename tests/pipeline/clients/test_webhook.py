from __future__ import annotations

import json
import os
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from certificates import Authority
from publishers import NAMES
from witnesses import wait_until

from maskcast.engines.errors import InputError
from maskcast.pipeline.clients import webhook
from maskcast.pipeline.clients.secret import read_secret
from maskcast.pipeline.clients.webhook import Webhook, run_webhook, sign
from maskcast.pipeline.publisher.publisher import Publisher
from maskcast.pipeline.subscriber.received import StreamEvent


class Server:
    """An HTTP server that answers with given statuses, then with 204.

    Args:
        certificate: Files of its certificate and its key, for https.
    """

    def __init__(self, certificate: tuple[Path, Path] | None = None) -> None:
        self.statuses: list[int] = []
        self.requests: list[tuple[dict[str, str], bytes]] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                server.requests.append((dict(self.headers.items()), body))
                self.send_response(server.statuses.pop(0) if server.statuses else 204)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self._server.server_port
        self.url = f"http://127.0.0.1:{self.port}/hook?a=b"
        if certificate is not None:
            context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            context.load_cert_chain(*certificate)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
            self.url = self.url.replace("http:", "https:")
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(webhook, "FIRST_RETRY_S", 0.02)
    server = Server()
    yield server
    server.close()


def event(number: int) -> StreamEvent:
    data = {"track_id": number, "zone": "door", "capture_ns": 5}
    return StreamEvent("cam1", "ab" * 8, "zone_entered", data, 7, 9)


def test_events_are_signed_and_sent_again_until_they_are_accepted(server: Server) -> None:
    server.statuses = [503, 429, 500]
    with Webhook(server.url, "secret") as hook:
        hook.post(event(1))
        hook.post(event(2))
        wait_until(lambda: hook.delivered == 2)
    assert hook.lost == 0
    bodies = [json.loads(body) for _, body in server.requests]
    assert [body["data"]["track_id"] for body in bodies] == [1, 1, 1, 1, 2]
    assert bodies[0]["event"] == "zone_entered"
    assert bodies[0]["time_ns"] == 5
    assert len({headers["Maskcast-Delivery"] for headers, _ in server.requests}) == 2
    for headers, body in server.requests:
        expected = sign("secret", headers["Maskcast-Timestamp"], body)
        assert headers["Maskcast-Signature"] == expected
    assert sign("secret", "0", b"{}") != sign("other", "0", b"{}")


def test_an_event_that_is_refused_permanently_is_counted_and_delays_no_other(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    server.statuses = [400, 302]
    with Webhook(server.url, None) as hook:
        for number in range(3):
            hook.post(event(number))
        wait_until(lambda: hook.delivered == 1)
    assert hook.lost == 2
    assert len(server.requests) == 3
    assert "webhook_event_lost" in caplog.text
    assert "Maskcast-Signature" not in server.requests[0][0]


def test_the_queue_is_bounded_while_the_server_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhook, "MAX_QUEUED", 3)
    with Webhook("http://127.0.0.1:9/", None) as hook:
        for number in range(10):
            hook.post(event(number))
        assert hook.lost == 7
    assert hook.lost == 10  # what is not delivered at the end is lost too


def test_the_bridge_posts_what_a_publisher_sends(server: Server) -> None:
    with Publisher("tcp://127.0.0.1:0", NAMES) as publisher:
        arguments = (publisher.endpoint, server.url)
        wanted = {"events": ["zone_left", "ended"]}
        thread = threading.Thread(target=run_webhook, args=arguments, kwargs=wanted, daemon=True)
        thread.start()
        assert publisher.wait_for_subscribers(1, 60, ["cam1"])
        publisher.event("cam1", "zone_entered", zone="door")
        publisher.event("cam1", "zone_left", zone="door", dwell_s=1.5)
        publisher.event("cam1", "ended")
        wait_until(lambda: len(server.requests) == 2)
    names = [json.loads(body)["event"] for _, body in server.requests]
    assert names == ["zone_left", "ended"]


def test_the_command_posts_over_https_to_a_server_whose_certificate_is_right(
    tmp_path: Path,
) -> None:
    """A real run, the command as a process, and an https server with an authority for the test."""
    authority, other = Authority(tmp_path / "ca.pem"), Authority(tmp_path / "other.pem")
    server = Server(authority.issue("127.0.0.1", tmp_path))
    (tmp_path / "secret").write_text("word\n")
    endpoint = f"ipc://{tmp_path}/messages"

    @contextmanager
    def bridge(ca_file: Path, url: str) -> Iterator[subprocess.Popen[str]]:
        command = [sys.executable, "-m", "maskcast", "bridge", "webhook", endpoint, url]
        options = ["--secret-file", str(tmp_path / "secret"), "--on", "state,ended"]
        environment = os.environ | {"SSL_CERT_FILE": str(ca_file)}
        with subprocess.Popen(
            [*command, *options], stderr=subprocess.PIPE, text=True, env=environment
        ) as process:
            try:
                yield process
            finally:
                process.kill()

    run = [sys.executable, "-m", "maskcast", "run", "test://64x48@5", "--publish", endpoint]
    with subprocess.Popen(run) as running:
        try:
            wrong_host = server.url.replace("127.0.0.1", "localhost")
            for ca_file, url in ((other.path, server.url), (authority.path, wrong_host)):
                with bridge(ca_file, url) as process:
                    assert process.stderr is not None
                    line = process.stderr.readline()
                assert "event=webhook_failed" in line
                assert "certificate verify failed" in line
            assert server.requests == []
            with bridge(authority.path, server.url):
                wait_until(lambda: server.requests, 120)
                running.terminate()
                wait_until(lambda: len(server.requests) >= 2, 120)
                assert running.wait(120) == 0
        finally:
            running.kill()
    server.close()
    for headers, body in server.requests:
        expected = sign("word", headers["Maskcast-Timestamp"], body)
        assert headers["Maskcast-Signature"] == expected
    first, *_, last = (json.loads(body) for _, body in server.requests)
    assert (first["event"], first["data"]["state"]) == ("state", "streaming")
    assert (last["event"], last["data"]["reason"]) == ("ended", "stopped")


def test_wrong_addresses_and_secrets_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for url in (
        "ftp://host/",
        "https:///path",
        "example.org",
        "http://host:99999/",
        "http://[::1/",
        "http://a..b/",
        "http://host/hö",
        "http://host/a b",
    ):
        with pytest.raises(InputError, match="expected https"):
            Webhook(url, None)
    with pytest.raises(InputError, match="has a password") as refused:
        Webhook("https://user:hunter2@host/", None)
    assert "hunter2" not in str(refused.value)
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "good").write_text("word\n")
    with pytest.raises(InputError, match="is empty"):
        read_secret(tmp_path / "empty", "X")
    with pytest.raises(InputError, match="cannot be read"):
        read_secret(tmp_path / "missing", "X")
    assert read_secret(tmp_path / "good", "X") == "word"
    monkeypatch.setenv("MASKCAST_TEST_SECRET", "other")
    assert read_secret(None, "MASKCAST_TEST_SECRET") == "other"
