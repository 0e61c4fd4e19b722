"""A source that is confined to its host, read from real HTTP servers on 127.0.0.1 and 127.0.0.2."""

from __future__ import annotations

import functools
import os
import resource
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from maskcast.engines.errors import InputError
from maskcast.pipeline.configuration.config import ConfinedSourceConfig, SourceConfig
from maskcast.pipeline.sources.host_proxy import HostProxy
from maskcast.pipeline.sources.video import VideoSource


class Server:
    """Serves a folder, and redirects by ``/to/URL``; ``asked`` lists the requested paths."""

    def __init__(self, host: str, folder: Path) -> None:
        owner = self
        self.asked: list[str] = []

        class Handler(SimpleHTTPRequestHandler):
            def do_GET(self) -> None:
                owner.asked.append(self.path)
                if self.path.startswith("/to/"):
                    self.send_response(302)
                    self.send_header("Location", self.path.removeprefix("/to/"))
                    self.end_headers()
                else:
                    super().do_GET()

            def log_message(self, *arguments: Any) -> None:
                pass

        handler = functools.partial(Handler, directory=str(folder))
        self._server = ThreadingHTTPServer((host, 0), handler)
        self.url = f"http://{host}:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[[str], Server]]:
    with ExitStack() as closing:

        def start(host: str) -> Server:
            server = Server(host, tmp_path)
            closing.callback(server.close)
            return server

        yield start


@pytest.fixture(autouse=True)
def no_proxy_is_unset(monkeypatch) -> None:
    monkeypatch.delenv("no_proxy", raising=False)


def read(url: str, kind: type[SourceConfig] = ConfinedSourceConfig) -> int:
    with VideoSource(kind(url=url, open_timeout_s=20)) as source:
        return len(list(source))


def test_a_confined_source_is_read_and_follows_redirects_on_its_host(make_clip, serve) -> None:
    make_clip("a.mp4", frames=10)
    own = serve("127.0.0.1")
    assert read(f"{own.url}/a.mp4") == 10
    assert read(f"{own.url}/to/{own.url}/a.mp4") == 10
    assert read(f"{own.url}/to//a.mp4") == 10
    other_port = serve("127.0.0.1")
    assert read(f"{own.url}/to/{other_port.url}/a.mp4") == 10


def test_a_confined_source_is_read_by_a_process_with_more_than_1024_open_files(
    make_clip, serve
) -> None:
    make_clip("a.mp4", frames=10)
    own = serve("127.0.0.1")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 2048:
        pytest.skip("this system permits fewer open files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2048), hard))
    try:
        with ExitStack() as closing:
            for _ in range(1100):
                closing.enter_context(Path(os.devnull).open("rb"))
            assert read(f"{own.url}/a.mp4") == 10
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_redirect_to_another_host_is_refused_and_that_host_is_not_asked(
    make_clip, serve, caplog
) -> None:
    make_clip("a.mp4", frames=10)
    own, other = serve("127.0.0.1"), serve("127.0.0.2")
    url = f"{own.url}/to/{other.url}/a.mp4"
    assert read(url, SourceConfig) == 10
    assert other.asked
    other.asked.clear()
    with pytest.raises(InputError, match=r"leads to another host, '127\.0\.0\.2'"):
        read(url)
    with pytest.raises(InputError, match="leads to another host"):
        read(f"{own.url}/to/{own.url}/to/{other.url}/a.mp4")
    with pytest.raises(InputError, match="leads to another host"):
        read(f"{own.url}/to/{other.url.replace('http', 'https')}/a.mp4")
    assert other.asked == []
    (shown, *_) = (r.fields for r in caplog.records if r.getMessage() == "source_host_refused")
    assert (shown["host"], shown["allowed"]) == ("127.0.0.2", "127.0.0.1")


def test_the_segments_of_a_playlist_on_another_host_are_not_requested(
    make_clip, serve, tmp_path: Path
) -> None:
    make_clip("a.ts", frames=10)
    own, other = serve("127.0.0.1"), serve("127.0.0.2")
    playlist = "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{}/a.ts\n#EXT-X-ENDLIST\n"
    (tmp_path / "own.m3u8").write_text(playlist.format(own.url))
    (tmp_path / "other.m3u8").write_text(playlist.format(other.url))
    assert read(f"{own.url}/own.m3u8") == 10
    with pytest.raises(InputError):
        read(f"{own.url}/other.m3u8")
    assert other.asked == []


def test_a_tunnel_for_https_leads_to_the_host_only() -> None:
    with socket.create_server(("127.0.0.1", 0)) as host:
        proxy = HostProxy(f"https://127.0.0.1:{host.getsockname()[1]}/", "cam", 20)
        port = int(proxy.url.rpartition(":")[2])
        for name, answer in (("127.0.0.1", b"200"), ("localhost", b"403"), ("127.0.0.2", b"403")):
            with socket.create_connection(("127.0.0.1", port)) as client:
                client.sendall(f"CONNECT {name}:{host.getsockname()[1]} HTTP/1.1\r\n\r\n".encode())
                assert client.recv(4096).split()[1] == answer
                if answer == b"200":
                    server, _ = host.accept()
                    with server:
                        client.sendall(b"hello")
                        assert server.recv(5) == b"hello"
                        server.sendall(b"you")
                        assert client.recv(3) == b"you"
        proxy.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "proxy cam"]


def test_nothing_is_opened_without_the_proxy(monkeypatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with pytest.raises(InputError, match="no_proxy"):
        read("http://127.0.0.1:9/a.mp4")
