"""The server of the page, with clients that are not browsers."""

from __future__ import annotations

import http.client
import json
import struct
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from keyring import allow, new_client
from studio import Scene, Studio, blobs, jpeg
from witnesses import wait_until

pytest.importorskip("starlette")
websockets = pytest.importorskip("websockets")
from websockets.exceptions import ConnectionClosed, InvalidStatus  # noqa: E402
from websockets.sync.client import ClientConnection, connect  # noqa: E402

from maskcast.pipeline.clients.view import feed  # noqa: E402
from maskcast.pipeline.wire.curve import new_keys  # noqa: E402
from maskcast.pipeline.wire.server_keys import ServerKeys  # noqa: E402

TOKEN = "correct-horse-battery"
INSTANCES = blobs([(20, 30, 120, 200), (150, 20, 300, 120)])


def get(url: str, path: str = "/", **headers: str) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)
    connection.request("GET", path, headers=headers)
    response = connection.getresponse()
    response.body = response.read()  # type: ignore[attr-defined]
    connection.close()
    return response


class Viewer:
    """A client that reads the stream of the page."""

    def __init__(self, socket: ClientConnection) -> None:
        self.socket = socket

    def receive(self, timeout_s: float = 60) -> dict[str, Any]:
        """Return the next message: a state or link, or the header of a packet."""
        message = self.socket.recv(timeout=timeout_s)
        if isinstance(message, str):
            return dict(json.loads(message))
        header_bytes, mask_bytes = struct.unpack_from("<II", message, 8)
        packet = json.loads(message[16 : 16 + header_bytes])
        arrays = (28 if packet["ids"] else 24) * packet["count"]
        image = message[16 + header_bytes + arrays + mask_bytes :]
        return (
            packet
            | {"kind": "frame", "age_ms": struct.unpack_from("<d", message)[0]}
            | {
                "image": image,
                "mask_bytes": mask_bytes,
            }
        )

    def receive_one(self) -> dict[str, Any]:
        """Return the next message; acknowledge it if it is a frame."""
        item = self.receive()
        if item["kind"] == "frame":
            self.socket.send(item["source"])
        return item

    def frame(self, source: str) -> dict[str, Any]:
        """Return the next frame of a source."""
        while True:
            item = self.receive_one()
            if item["kind"] == "frame" and item["source"] == source:
                return item

    def state(self, source: str, state: str) -> dict[str, Any]:
        while True:
            item = self.receive_one()
            if item.get("source") == source and item.get("state") == state:
                return item


@contextmanager
def viewing(url: str, token: str = "", **options: Any) -> Iterator[Viewer]:
    with connect(url.replace("http:", "ws:") + "stream", max_size=None, **options) as socket:
        socket.send(token)
        yield Viewer(socket)


@pytest.fixture(scope="module")
def url(studio: Studio, serve: Any) -> str:
    studio.scenes["cam1"] = Scene(INSTANCES, jpeg(), {"desk": 2}, {"door": {"forward": 3}})
    studio.scenes["cam2"] = Scene(blobs([]))
    return str(serve(studio.endpoint))


def test_every_answer_forbids_scripts_of_others(url: str) -> None:
    for path in ("/", "/view.js", "/view.css", "/packet.js", "/missing"):
        response = get(url, path)
        assert response.status == (404 if path == "/missing" else 200)
        policy = response.headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy
        assert "script-src 'self';" in policy
        assert "unsafe" not in policy
        assert response.headers["X-Content-Type-Options"] == "nosniff"
    assert b'<script type="module" src=' in get(url).body  # type: ignore[attr-defined]
    assert "uvicorn" not in str(get(url).headers)


def test_names_that_are_not_of_this_machine_are_refused(url: str) -> None:
    response = get(url, Host="evil.example")
    assert response.status == 421
    assert b"maskcast" not in response.body  # type: ignore[attr-defined]
    upgrade = {
        "Host": "evil.example",
        "Connection": "Upgrade",
        "Upgrade": "websocket",
        "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
        "Sec-WebSocket-Version": "13",
    }
    assert get(url, "/stream", **upgrade).status == 403


@pytest.mark.parametrize("origin", ["http://evil.example", "http://127.0.0.1:1", "null"])
def test_pages_of_other_origins_are_refused(url: str, origin: str) -> None:
    with pytest.raises(InvalidStatus) as refused, viewing(url, origin=origin):
        pass
    assert refused.value.response.status_code == 403
    with viewing(url, origin=url.rstrip("/")) as viewer:
        assert viewer.frame("cam1")


def test_a_frame_arrives_whole(url: str) -> None:
    with viewing(url) as viewer:
        frame = viewer.frame("cam1")
        assert (frame["width"], frame["height"], frame["count"]) == (320, 240, 2)
        assert frame["names"] == {"1": "person", "2": "dog"}
        assert frame["zones"] == {"desk": 2}
        assert frame["lines"] == {"door": {"forward": 3}}
        assert frame["masks"] == "crops"
        assert frame["mask_bytes"] == 2 * 784
        assert frame["image"] == jpeg()
        assert 0 < frame["age_ms"] < 60_000
        assert viewer.frame("cam2")["image"] == b""


def test_a_viewer_that_does_not_read_delays_no_other(url: str) -> None:
    with viewing(url) as slow, viewing(url) as quick:
        slow.frame("cam1")  # connected; from here on it neither reads nor acknowledges
        first = quick.frame("cam1")["seq"]
        while (last := quick.frame("cam1")["seq"]) < first + 60:
            pass
        old = 0  # frames that were sent before the viewer stopped acknowledging
        while old < feed.MAX_IN_FLIGHT:
            item = slow.receive()
            old += item["kind"] == "frame" and item["source"] == "cam1"
        slow.socket.send("cam1")
        assert slow.frame("cam1")["seq"] >= last  # new, not 60 frames old


@pytest.mark.usefixtures("url")  # it sets the scenes
def test_the_token_opens_the_stream_and_nothing_else_does(studio: Studio, serve: Any) -> None:
    guarded = serve(studio.endpoint, TOKEN)
    assert get(guarded, Host="camera.example").status == 200  # the page holds no secret
    for wrong in ("", "wrong" * 5):
        with viewing(guarded, wrong) as viewer, pytest.raises(ConnectionClosed) as closed:
            viewer.receive()
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 4401
    with viewing(guarded, TOKEN) as viewer:
        assert viewer.frame("cam1")


def test_malformed_messages_of_a_viewer_do_no_harm(url: str) -> None:
    with viewing(url) as viewer:
        for message in (b"\x00\xff", "", "no such source", "x" * 4000):
            viewer.socket.send(message)
        assert viewer.frame("cam1")
        viewer.socket.send("x" * 100_000)
        with pytest.raises(ConnectionClosed):
            deque(iter(viewer.receive, None))
    with viewing(url) as viewer:
        assert viewer.frame("cam1")


def test_states_are_sent_and_a_removed_source_is_forgotten(url: str, studio: Studio) -> None:
    studio.scenes["cam3"] = Scene(blobs([]))
    studio.event("cam3", "state", state="streaming", reconnects=0)
    with viewing(url) as viewer:
        viewer.frame("cam3")
        studio.event("cam3", "state", state="stalled", reconnects=0, reason="no data")
        assert viewer.state("cam3", "stalled")["reason"] == "no data"
        with viewing(url) as late:
            assert late.state("cam3", "stalled")
        del studio.scenes["cam3"]
        studio.event("cam3", "ended", reason="removed")
        viewer.state("cam3", "ended")
        with viewing(url) as late:
            items = [late.receive_one() for _ in range(20)]
            assert "cam3" not in {item.get("source") for item in items}


def test_without_viewers_nothing_is_subscribed_to(serve: Any) -> None:
    studio = Studio()
    try:
        studio.scenes["cam1"] = Scene(INSTANCES, jpeg())
        url = serve(studio.endpoint)
        assert not studio.subscribers
        with viewing(url) as viewer:
            viewer.frame("cam1")
            assert studio.subscribers
        wait_until(lambda: not studio.subscribers, what="the view unsubscribes")
        with viewing(url) as viewer:
            assert viewer.frame("cam1")
    finally:
        studio.close()


def test_a_publisher_that_is_restarted_is_shown_again(serve: Any) -> None:
    studio = Studio()
    studio.scenes["cam1"] = Scene(INSTANCES)
    with viewing(serve(studio.endpoint)) as viewer:
        first = viewer.frame("cam1")
        studio.close()
        studio = Studio(studio.endpoint)
        try:
            studio.scenes["cam1"] = Scene(INSTANCES)
            wait_until(lambda: viewer.frame("cam1")["publisher"] != first["publisher"])
        finally:
            studio.close()


def test_sources_that_a_restarted_publisher_does_not_have_are_forgotten(
    serve: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed, "FORGET_AFTER_S", 1.0)
    studio = Studio()
    studio.scenes |= {"cam1": Scene(INSTANCES), "cam2": Scene(INSTANCES)}
    with viewing(serve(studio.endpoint)) as viewer:
        viewer.frame("cam2")
        studio.close()
        studio = Studio(studio.endpoint)
        try:
            studio.scenes["cam1"] = Scene(INSTANCES)
            assert viewer.state("cam2", "ended")["reason"] == "removed"
            assert viewer.frame("cam1")
        finally:
            studio.close()


def test_a_page_shows_what_the_key_of_its_view_may_see(serve: Any, tmp_path: Path) -> None:
    new_keys(tmp_path / "server")
    new_client(tmp_path / "clients/view", "door")
    studio = Studio(keys=ServerKeys.read(tmp_path / "server.key_secret", tmp_path / "clients"))
    try:
        studio.scenes |= {"door": Scene(INSTANCES), "yard": Scene(INSTANCES)}
        page = serve(
            studio.endpoint,
            server_key=tmp_path / "server.key",
            client_key=tmp_path / "clients/view.key_secret",
        )
        with viewing(page) as viewer:
            viewer.frame("door")
            shown = {viewer.receive_one().get("source") for _ in range(20)}
            assert shown <= {"door", None}
            allow(tmp_path / "clients/view.key", "yard")
            viewer.frame("yard")
            with viewing(page) as another:  # receives nothing of what was known before
                shown = {another.receive_one().get("source") for _ in range(20)}
                assert shown == {"yard", None}

            before = viewer.frame("yard")
            allow(tmp_path / "clients/view.key", "yard", "cellar")
            after = viewer.frame("yard")
            while after["lost"] == 0:
                after = viewer.frame("yard")
            assert after["lost"] < after["seq"] - before["seq"]

            (tmp_path / "clients/view.key").unlink()

            def is_nothing_shown() -> bool:
                with viewing(page) as another, suppress(TimeoutError):
                    while (item := another.receive(timeout_s=1))["kind"] == "link":
                        pass
                    assert item["source"] == "yard"
                    return False
                return True

            wait_until(is_nothing_shown)
    finally:
        studio.close()
