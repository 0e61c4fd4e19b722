import functools
import logging
import os
import socket as posix_socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st
from keyring import allow, new_client
from witnesses import wait_until

from maskcast.engines.errors import InputError
from maskcast.pipeline.configuration.config import ControlConfig, SourceConfig
from maskcast.pipeline.configuration.config_file import make_config
from maskcast.pipeline.control.client import ControlClient
from maskcast.pipeline.control.controllable import PipelineControl
from maskcast.pipeline.control.messages import (
    MAX_REQUEST_BYTES,
    AddSource,
    Answer,
    ListSources,
    MoveSource,
    RemoveSource,
    decode_request,
)
from maskcast.pipeline.control.server import MAX_PART_BYTES, ControlServer
from maskcast.pipeline.pipeline import Pipeline
from maskcast.pipeline.stats import Meter
from maskcast.pipeline.subscriber.subscribe import subscribe
from maskcast.pipeline.subscriber.subscription import StreamEvent
from maskcast.pipeline.wire.curve import ClientKeys, new_keys


@contextmanager
def controlled(
    engine, control: str | dict[str, Any], *sources: dict[str, Any], **sections
) -> Iterator[Pipeline]:
    """Run a pipeline until the end of the block, where it must end without an error."""
    sections.setdefault("publish", None)
    raw = {"sources": list(sources), "control": control, **sections}
    pipeline = Pipeline(make_config(raw), engine)
    pipeline.start()
    try:
        yield pipeline
    finally:
        pipeline.stop()
        assert pipeline.wait(60)
    pipeline.join()


@pytest.fixture
def endpoint(tmp_path: Path) -> str:
    return f"ipc://{tmp_path}/control"


@pytest.fixture
def client(endpoint: str) -> ControlClient:
    return ControlClient(endpoint, 60.0)


def add(client: ControlClient, name: str, url: str | Path, **options: Any) -> None:
    client.ask(AddSource({"name": name, "url": str(url), **options}))


def states(client: ControlClient) -> dict[str, str]:
    return {source.name: str(source.state) for source in client.list()}


def test_adding_and_removing_sources_does_not_affect_others(
    endpoint, client, timed_engine, make_clip
) -> None:
    steady = {"name": "steady", "url": "test://64x48@50", "policy": "block", "max_fps": 50}
    with controlled(timed_engine(0.002), endpoint, steady) as pipeline:
        add(client, "clip", make_clip(frames=30), loop=True)
        add(client, "pattern", "test://96x64@30", every_nth=2)
        wait_until(lambda: all(source.processed > 5 for source in pipeline.stats().sources))
        by_name = {source.name: source for source in client.list()}
        assert list(by_name) == ["steady", "clip", "pattern"]
        assert (by_name["clip"].width, by_name["clip"].height) == (64, 48)
        assert [source.policy for source in by_name.values()] == ["block", "block", "latest"]
        assert by_name["pattern"].skipped > 0
        assert by_name["clip"].fps > 0
        before = pipeline.stats().sources[0]
        assert client.remove("clip")
        assert client.remove("pattern")
        assert states(client) == {"steady": "streaming"}
        wait_until(lambda: pipeline.stats().sources[0].processed > before.processed + 10)
        steady_now = pipeline.stats().sources[0]
    assert steady_now.captured >= before.captured + 10  # its counts continued
    (end,) = pipeline.stats().sources
    assert {reason for _, reason in end.dropped} <= {"stopped"}


def test_subscribers_receive_added_and_removed_sources_and_numbers_continue(
    endpoint, client, timed_engine, tmp_path
) -> None:
    publish = {"endpoint": f"ipc://{tmp_path}/messages", "wait_subscribers": 1}
    items: list[Any] = []

    def has_ended() -> bool:
        return bool(items) and (items[-1].source, getattr(items[-1], "name", "")) == (
            "steady",
            "ended",
        )

    def listen() -> None:
        with subscribe(
            publish["endpoint"], policy="all", events=True, until_ended=False, timeout_s=200
        ) as stream:
            while not has_ended():
                items.append(stream.receive())

    listener = threading.Thread(target=listen)
    listener.start()
    steady = {"name": "steady", "url": "test://64x48@40"}
    with controlled(timed_engine(), endpoint, steady, publish=publish) as pipeline:
        wait_until(lambda: pipeline.stats().sources[0].processed > 3)
        for _ in range(2):
            add(client, "guest", "test://32x32@40")
            wait_until(lambda: pipeline.stats().sources[1].processed > 5)
            assert client.remove("guest")
        with subscribe(publish["endpoint"], policy="all", events=True) as late:
            reported = [late.receive() for _ in range(10)]
        # New subscribers receive nothing of removed sources.
        assert {item.source for item in reported} == {"steady"}
    listener.join()
    guest = [item for item in items if item.source == "guest"]
    frames = [item for item in guest if not isinstance(item, StreamEvent)]
    assert [frame.seq for frame in frames] == list(range(len(frames)))
    assert all(frame.lost_before == 0 for frame in frames)
    # The second "guest" counts its frames from 0.
    assert sum(after.index < before.index for before, after in pairwise(frames)) == 1
    events = [item for item in guest if isinstance(item, StreamEvent)]
    reported = [
        event.data.get("state", event.name)
        for event in events
        if event.name in ("state", "ended", "size")
    ]
    assert reported == ["streaming", "size", "ended"] * 2
    assert {event.data["reason"] for event in events if event.name == "ended"} == {"removed"}
    others = [item.seq for item in items if item.source == "steady" and hasattr(item, "instances")]
    assert others == list(range(len(others)))


def test_removed_sources_leave_nothing_behind(
    endpoint, client, timed_engine, make_clip, free_port
) -> None:
    clip = make_clip(frames=30)
    urls = ("test://64x48@100", str(clip), f"rtsp://127.0.0.1:{free_port}/cam")

    def threads() -> list[str]:
        return sorted(thread.name for thread in threading.enumerate())

    def handles() -> int:
        return len(os.listdir("/proc/self/fd"))  # noqa: PTH208

    with controlled(timed_engine(), endpoint, {"url": "test://64x48@50", "name": "stays"}) as p:
        add(client, "first", clip)
        assert client.remove("first")
        wait_until(lambda: "decode first" not in threads())
        before, handles_before = threads(), handles()  # one or two may be about to be closed
        for number in range(50):
            add(client, "guest", urls[number % 3], loop=number % 3 == 1)
            if number % 5 == 0:
                time.sleep(0.05)
            assert client.remove("guest")
        wait_until(lambda: threads() == before and handles() <= handles_before)
        assert states(client) == {"stays": "streaming"}
        assert [source.name for source in p.stats().sources] == ["stays"]


def test_a_mistake_in_add_is_reported_in_one_line_and_affects_no_other_source(
    endpoint, client, timed_engine, make_clip, tmp_path
) -> None:
    (tmp_path / "text.mp4").write_text("no video")
    with controlled(timed_engine(), endpoint, {"url": "test://64x48@50", "name": "on"}) as pipeline:
        for source, message in [
            ({"name": "on", "url": "test://8x8@1"}, "there is a source 'on' already"),
            ({"url": "test://8x8@1"}, "needs a name"),
            ({"name": "a"}, "'url' is missing"),
            ({"name": "a/b", "url": "test://8x8@1"}, "name: use 1 to 64 letters"),
            ({"name": "a", "url": "test://8x8@1", "polcy": "block"}, "did you mean 'policy'"),
            ({"name": "a", "url": "test://8x8@1", "policy": "all"}, "policy: invalid"),
            ({"name": "a", "url": "gopher://u:hunter2@host/x"}, "scheme 'gopher'"),
            ({"name": "a", "url": "test://nonsense"}, "WIDTHxHEIGHT@FPS"),
            ({"name": "a", "url": "gone\nfor ever.mp4"}, "no such file"),
        ]:
            with pytest.raises(InputError, match=message) as caught:
                client.ask(AddSource(source))
            assert "\n" not in str(caught.value)
            assert "hunter2" not in str(caught.value)
        with pytest.raises(InputError, match="no source 'off'; there are: on"):
            client.remove("off")
        add(client, "text", tmp_path / "text.mp4")
        wait_until(lambda: states(client)["text"] == "ended")
        (text,) = (source for source in client.list() if source.name == "text")
        assert "not a video" in text.detail
        with pytest.raises(InputError, match="there is a source 'text' already"):
            add(client, "text", make_clip())
        assert client.remove("text")
        add(client, "text", make_clip())
        wait_until(lambda: states(client)["text"] == "ended")
        assert pipeline.stats().sources[1].processed == 10
        assert not pipeline.wait(0.1)


def test_one_pipeline_moves_nothing(server: ControlServer) -> None:
    request = msgspec.msgpack.encode(MoveSource("cam", "node"))
    answer = msgspec.msgpack.decode(server.answer(request), type=Answer)
    assert not answer.ok
    assert "cannot move 'cam'" in answer.error


def test_a_pipeline_with_a_control_socket_waits_for_its_first_source(
    endpoint, client, timed_engine, make_clip
) -> None:
    engine = timed_engine()
    with controlled(engine, endpoint) as pipeline:
        assert client.list() == []
        add(client, "clip", make_clip())
        wait_until(lambda: states(client)["clip"] == "ended")
        assert client.remove("clip")
        assert not pipeline.wait(0.3)
        assert client.list() == []
    assert sum(engine.batches) == 10
    with pytest.raises(InputError, match="pipeline is ending"):
        pipeline.add(SourceConfig(url="test://8x8@1", name="late"))
    with pytest.raises(InputError, match="no answer"):
        ControlClient(endpoint, 0.1).list()


def test_without_a_control_socket_a_pipeline_ends_with_its_last_source(
    timed_engine, make_clip
) -> None:
    config = make_config({"sources": [{"url": "test://64x48@50", "name": "a"}], "publish": None})
    pipeline = Pipeline(config, timed_engine())
    with pytest.raises(InputError, match="has not started"):
        pipeline.add(SourceConfig(url="test://8x8@1", name="early"))
    pipeline.start()
    pipeline.add(SourceConfig(url=str(make_clip()), name="b"))
    pipeline.remove("a")
    assert pipeline.wait(60)
    pipeline.join()
    with pytest.raises(InputError, match="pipeline is ending"):
        pipeline.add(SourceConfig(url="test://8x8@1", name="late"))


def test_the_password_of_an_added_camera_is_never_shown(
    endpoint, client, timed_engine, rtsp_server, caplog
) -> None:
    rtsp_server.start("--credentials", "admin:hunter2")
    url = rtsp_server.url.replace("//", "//admin:hunter2@")
    with (
        caplog.at_level(logging.DEBUG),
        controlled(timed_engine(), endpoint, {"url": "test://64x48@20", "name": "on"}) as pipeline,
    ):
        add(client, "cam", url)
        wait_until(lambda: pipeline.stats().sources[1].processed > 5)
        shown = repr(client.list())
        rtsp_server.stop()
        wait_until(lambda: states(client)["cam"] == "reconnecting")
        shown += repr(client.list())
        assert client.remove("cam")
    assert "rtsp://***@127.0.0.1" in shown
    assert "hunter2" not in shown + caplog.text


@pytest.fixture(scope="module")
def server() -> Iterator[ControlServer]:
    class Nothing:
        """A pipeline without sources that takes none."""

        def add(self, source: SourceConfig) -> None:
            raise InputError("no")

        def remove(self, name: str) -> None:
            raise InputError("no")

        def sources(self) -> list[SourceConfig]:
            return []

        def stats(self):
            return Meter([]).stats()

    config = ControlConfig(endpoint="ipc://nowhere")
    server = ControlServer(config, None, PipelineControl(Nothing()), lambda error: None)
    yield server
    server.close()


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats()
    | st.text(max_size=9)
    | st.binary(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=7), inner, max_size=3)
    ),
    max_leaves=8,
)
REQUESTS = st.fixed_dictionaries(
    {"request": st.sampled_from(["list", "add", "remove", "dance"]) | VALUES},
    optional={"source": VALUES, "name": VALUES, "extra": VALUES},
)


@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=200) | (VALUES | REQUESTS).map(msgspec.msgpack.encode))
def test_any_bytes_are_answered(server, data: bytes) -> None:
    answer = msgspec.msgpack.decode(server.answer(data), type=Answer)
    assert answer.ok == (answer.sources == [])
    assert answer.ok or answer.error
    assert "\n" not in answer.error


@pytest.mark.parametrize(
    "data",
    [b"\x81" * 10_000, b"\x91" * 10_000 + b"\x00", b"\xdf\xff\xff\xff\xff", b"\xc1", b"x" * 20_000],
    ids=["maps in maps", "lists in lists", "a map of huge length", "no msgpack", "too long"],
)
def test_hostile_bytes_are_answered(server, data: bytes) -> None:
    answer = msgspec.msgpack.decode(server.answer(data), type=Answer)
    assert not answer.ok
    with pytest.raises(InputError):
        decode_request(data)


def test_garbage_at_the_socket_affects_neither_the_pipeline_nor_other_clients(
    free_port, timed_engine
) -> None:
    endpoint = f"tcp://127.0.0.1:{free_port}"
    client = ControlClient(endpoint, 60.0)
    with controlled(timed_engine(), endpoint, {"url": "test://64x48@50", "name": "on"}) as pipeline:
        wait_until(lambda: states(client) == {"on": "streaming"})
        with zmq.Context() as context:
            for kind in (zmq.DEALER, zmq.REQ):
                for parts in (
                    [b"\xff" * 9],
                    [b"", b"", b"a"],
                    [b""] * 50,
                    [bytes(MAX_PART_BYTES + 1)],
                ):
                    with context.socket(kind) as stranger:
                        stranger.set(zmq.LINGER, 200)
                        stranger.connect(endpoint)
                        stranger.send_multipart(parts)
            with context.socket(zmq.REQ) as stranger:
                stranger.connect(endpoint)
                stranger.send(bytes(MAX_REQUEST_BYTES + 1))
                answer = msgspec.msgpack.decode(stranger.recv(), type=Answer)
                assert f"{MAX_REQUEST_BYTES} bytes at most" in answer.error
        for garbage in (
            b"",
            b"GET / HTTP/1.1\r\n\r\n",
            b"\xff" * 5000,
            b"\xff" + bytes(8) + b"\x7f",
        ):
            with posix_socket.create_connection(("127.0.0.1", free_port)) as stranger:
                stranger.sendall(garbage)
        before = pipeline.stats().processed
        assert states(client) == {"on": "streaming"}
        wait_until(lambda: pipeline.stats().processed > before + 5)


def test_without_keys_only_local_clients_are_served(timed_engine, endpoint) -> None:
    for control, message in [
        ("tcp://*:0", "anyone on the network could control this"),
        ("tcp://0.0.0.0:0", "anyone on the network could control this"),
        ("127.0.0.1:5556", "invalid endpoint"),
        ("ipc:///nowhere/at/all", "cannot be controlled on"),
    ]:
        config = make_config(
            {"sources": [{"url": "test://8x8@1"}], "publish": None, "control": control}
        )
        with pytest.raises(InputError, match=message):
            Pipeline(config, timed_engine()).run()
    with controlled(timed_engine(), endpoint):
        path = Path(endpoint.removeprefix("ipc://"))
        wait_until(path.exists)
        wait_until(lambda: path.stat().st_mode & 0o777 == 0o600)
        again = make_config({"publish": None, "control": endpoint})
        with pytest.raises(InputError, match="in use"):
            Pipeline(again, timed_engine()).run()
    assert not path.exists()


@pytest.fixture
def curve(tmp_path: Path) -> dict[str, str]:
    """Make keys of a server, a viewer who may subscribe, and an operator who may control."""
    new_keys(tmp_path / "server")
    new_client(tmp_path / "viewers/viewer")
    new_client(tmp_path / "operators/operator", control=True)
    return {
        "secret_key": str(tmp_path / "server.key_secret"),
        "allowed_clients": str(tmp_path / "viewers"),
    }


def test_viewing_and_controlling_are_two_rights(timed_engine, tmp_path, free_port, curve) -> None:
    endpoint = f"tcp://127.0.0.1:{free_port}"
    control = {
        "endpoint": f"tcp://*:{free_port}",
        "allowed_clients": str(tmp_path / "operators"),
    }
    messages = f"ipc://{tmp_path}/messages"
    publish = {"endpoint": messages, "curve": curve}
    server_key = tmp_path / "server.key"

    def client(key: str, timeout_s: float) -> ControlClient:
        secret = tmp_path / key
        return ControlClient(endpoint, timeout_s, server_key=server_key, client_key=secret)

    with controlled(timed_engine(), control, publish=publish):
        operator = client("operators/operator.key_secret", 60.0)
        add(operator, "a", "test://64x48@10")
        assert "a" in states(operator)
        for refused in (client("viewers/viewer.key_secret", 0.5), ControlClient(endpoint, 0.5)):
            with pytest.raises(InputError, match="no answer"):
                refused.list()
        viewer = tmp_path / "viewers/viewer.key_secret"
        with subscribe(messages, server_key=server_key, client_key=viewer, timeout_s=60) as stream:
            assert stream.receive().source == "a"
    with pytest.raises(InputError, match="together"):
        ControlClient(endpoint, server_key=server_key)


def test_a_client_controls_the_sources_of_its_rights_only(
    timed_engine, tmp_path, free_port, curve, make_clip
) -> None:
    new_client(tmp_path / "operators/porter", "door*", control=True)
    new_client(tmp_path / "operators/watcher", "*")
    endpoint = f"tcp://127.0.0.1:{free_port}"
    control = {"endpoint": endpoint, "allowed_clients": str(tmp_path / "operators")}
    publish = {"endpoint": f"ipc://{tmp_path}/messages", "curve": curve}

    def client(name: str, timeout_s: float = 60.0) -> ControlClient:
        secret = tmp_path / f"operators/{name}.key_secret"
        server_key = tmp_path / "server.key"
        return ControlClient(endpoint, timeout_s, server_key=server_key, client_key=secret)

    with controlled(timed_engine(), control, publish=publish):
        operator, porter = client("operator"), client("porter")
        add(operator, "cellar", "test://64x48@10")
        add(operator, "door", "test://64x48@10")
        assert states(operator).keys() == {"cellar", "door"}
        assert states(porter).keys() == {"door"}
        add(porter, "door2", "test://64x48@10")
        refusals = set()
        for name in ("cellar", "absent"):
            for refused in (
                lambda name=name: porter.remove(name),
                lambda name=name: add(porter, name, "test://64x48@10"),
            ):
                with pytest.raises(InputError, match="may not control this source") as caught:
                    refused()
                refusals.add(str(caught.value).replace(name, "NAME"))
        assert len(refusals) == 1  # whether it exists or not
        assert porter.remove("door")
        with pytest.raises(InputError, match="no answer"):
            client("watcher", 0.5).list()


@pytest.mark.parametrize("what", ["right", "key"])
def test_control_is_withdrawn_and_given_while_the_pipeline_runs(
    timed_engine, tmp_path, free_port, curve, what: str
) -> None:
    new_client(tmp_path / "operators/porter", control=True)
    endpoint = f"tcp://127.0.0.1:{free_port}"
    control = {"endpoint": endpoint, "allowed_clients": str(tmp_path / "operators")}
    publish = {"endpoint": f"ipc://{tmp_path}/messages", "curve": curve}
    key = tmp_path / "operators/porter.key"
    context = zmq.Context()
    with context, controlled(timed_engine(), control, publish=publish):
        with context.socket(zmq.DEALER) as connection:  # stays connected, unlike ControlClient
            ClientKeys.read(tmp_path / "server.key", f"{key}_secret").apply(connection)
            connection.set(zmq.LINGER, 0)
            connection.connect(endpoint)

            def is_answered() -> bool:
                connection.send_multipart([b"", msgspec.msgpack.encode(ListSources())])
                if not connection.poll(300):
                    return False
                answer = msgspec.msgpack.decode(connection.recv_multipart()[1], type=Answer)
                return answer.ok

            wait_until(is_answered)
            content = key.read_bytes()
            allow(key) if what == "right" else key.unlink()
            wait_until(lambda: not is_answered())
        porter = ControlClient(
            endpoint, 0.5, server_key=tmp_path / "server.key", client_key=Path(f"{key}_secret")
        )
        assert not answers(porter)
        allow(key, control=True)
        key.write_bytes(content)
        wait_until(lambda: answers(porter))


def answers(client: ControlClient) -> bool:
    with suppress(InputError):
        client.list()
        return True
    return False


def test_keys_for_publishing_do_not_allow_remote_control(timed_engine, curve) -> None:
    publish = {"endpoint": "tcp://127.0.0.1:0", "curve": curve}
    config = make_config({"publish": publish, "control": "tcp://*:0"})
    with pytest.raises(InputError, match=r"set control\.allowed_clients"):
        Pipeline(config, timed_engine()).run()


def test_allowed_clients_need_a_key_of_the_server(timed_engine, tmp_path) -> None:
    control = {"endpoint": "tcp://*:0", "allowed_clients": str(tmp_path)}
    with pytest.raises(InputError, match=r"set publish\.curve\.secret_key"):
        Pipeline(make_config({"control": control}), timed_engine()).run()


def test_by_tcp_only_cameras_may_be_added_and_no_answer_shows_which_files_exist(
    timed_engine, free_port, make_clip, tmp_path
) -> None:
    endpoint = f"tcp://127.0.0.1:{free_port}"
    client = ControlClient(endpoint, 60.0)
    with controlled(timed_engine(), endpoint):
        add(client, "camera", "rtsp://127.0.0.1:1/cam")
        add(client, "pattern", "test://64x48@10")
        refusals = set()
        for path in (make_clip(), tmp_path / "absent.mp4", "/etc/shadow", "/etc/shadow/x"):
            with pytest.raises(InputError, match="not among the sources") as caught:
                add(client, "file", path)
            refusals.add(str(caught.value).replace(str(path), "PATH"))
        assert len(refusals) == 1
        for url in ("http://169.254.169.254/latest", "/dev/video0", "file:///etc/passwd"):
            with pytest.raises(InputError, match="not among the sources"):
                add(client, "other", url)


def test_what_may_be_added_is_configured(
    timed_engine, endpoint, client, make_clip, tmp_path
) -> None:
    clip = make_clip()
    control = {"endpoint": endpoint, "allow": [f"file:{clip.parent}"]}
    with controlled(timed_engine(), control):
        add(client, "clip", clip)
        with pytest.raises(InputError, match="not among the sources"):
            add(client, "pattern", "test://64x48@10")
    wrong = make_config({"control": {"endpoint": endpoint, "allow": ["rtsp//x"]}})
    with pytest.raises(InputError, match="invalid rule 'rtsp//x'"):
        Pipeline(wrong, timed_engine()).run()


def test_a_source_that_is_allowed_for_its_host_leads_to_no_other_host(
    timed_engine, endpoint, client, make_clip, tmp_path, monkeypatch
) -> None:
    monkeypatch.delenv("no_proxy", raising=False)
    make_clip("a.ts", frames=10)
    asked = []

    class Redirecting(SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.server.server_address[0])
            if self.path == "/a.ts":
                super().do_GET()
                return
            self.send_response(302)
            self.send_header("Location", other.url)
            self.end_headers()

        def log_message(self, *arguments: Any) -> None:
            pass

    handler = functools.partial(Redirecting, directory=str(tmp_path))
    with ExitStack() as closing:

        def serve(host: str) -> ThreadingHTTPServer:
            server = closing.enter_context(ThreadingHTTPServer((host, 0), handler))
            threading.Thread(target=server.serve_forever).start()
            closing.callback(server.shutdown)
            server.url = f"http://{host}:{server.server_port}/a.ts"
            return server

        own, other = serve("127.0.0.1"), serve("127.0.0.2")
        control = {"endpoint": endpoint, "allow": ["http://127.0.0.1"]}
        with controlled(timed_engine(), control) as pipeline:
            add(client, "good", own.url)
            add(client, "bad", own.url.replace("a.ts", "elsewhere"))

            def states() -> dict[str, str]:
                return {source.name: source.detail for source in pipeline.stats().sources}

            wait_until(lambda: states().get("good") == "end of stream", 60)
            wait_until(lambda: "another host" in states().get("bad", ""), 60)
        assert set(asked) == {"127.0.0.1"}
        asked.clear()
        with controlled(timed_engine(), {"endpoint": endpoint, "allow": ["http:"]}) as pipeline:
            add(client, "bad", own.url.replace("a.ts", "elsewhere"))
            wait_until(lambda: states().get("bad") == "end of stream", 60)
        assert set(asked) == {"127.0.0.1", "127.0.0.2"}


def test_requests_are_encoded_as_documented() -> None:
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(ListSources())) == {"request": "list"}
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(RemoveSource("door"))) == {
        "request": "remove",
        "name": "door",
    }
    source = {"name": "door", "url": "rtsp://camera/1", "policy": "latest"}
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(AddSource(source))) == {
        "request": "add",
        "source": source,
    }
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(Answer(ok=True))) == {"ok": True}
