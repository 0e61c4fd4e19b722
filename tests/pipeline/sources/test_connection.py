import socket
import threading
import time
import weakref

import pytest
from witnesses import wait_until

from maskcast.engines.errors import InputError
from maskcast.pipeline.configuration.config import SourceConfig
from maskcast.pipeline.inbox import InboxClosed
from maskcast.pipeline.sources import connection as connection_module
from maskcast.pipeline.sources import live as live_source
from maskcast.pipeline.sources.connection import Connection
from maskcast.pipeline.sources.errors import probe_tcp
from maskcast.pipeline.sources.live import MAX_HANGING, LiveSource
from maskcast.pipeline.sources.source import SourceLostError
from maskcast.pipeline.sources.state import StateChange


def take_all(connection: Connection) -> list[int]:
    indices = []
    try:
        while True:
            indices += [frame.index for frame in connection.inbox.take(timeout_s=10)]
    except InboxClosed:
        return indices


def test_a_connection_reads_to_the_end_and_closes_its_inbox(make_clip) -> None:
    connection = Connection(SourceConfig(url=str(make_clip(frames=20))))
    connection.start()
    assert take_all(connection) == list(range(20))
    connection.join()
    assert connection.error is None
    assert connection.last_packet_s is not None
    assert connection.last_packet_s >= connection.began_s


def test_a_connection_that_cannot_be_made_says_why(free_port: int) -> None:
    url = f"rtsp://admin:secret@127.0.0.1:{free_port}/cam"
    for knocks in (False, True):
        connection = Connection(SourceConfig(url=url), probe=knocks)
        connection.start()
        assert take_all(connection) == []
        assert isinstance(connection.error, InputError)
        assert "connection refused" in str(connection.error)
        assert "secret" not in str(connection.error) + connection.name


def test_an_abandoned_connection_closes_what_it_opened(make_clip) -> None:
    connection = Connection(SourceConfig(url=str(make_clip(frames=200)), loop=True))
    connection.start()
    connection.inbox.take()
    connection.abandon()
    connection.join(60)
    assert not connection.is_alive()
    assert connection.source is not None
    assert connection.source._container is None
    assert connection.error is None


def test_an_abandoned_connection_that_broke_is_freed_with_its_source(
    stalling_server, no_collector
) -> None:
    """Otherwise a camera that disconnects once a minute would leave frames in memory for hours."""
    connection = Connection(SourceConfig(url=stalling_server.url, read_timeout_s=0.3))
    connection.start()
    assert take_all(connection)
    connection.join()
    assert isinstance(connection.error, SourceLostError)
    parts = [weakref.ref(connection), weakref.ref(connection.source)]
    connection.abandon()
    del connection
    wait_until(lambda: [part() for part in parts] == [None, None])


def test_a_connection_that_breaks_after_it_was_abandoned_is_freed(
    monkeypatch, no_collector
) -> None:
    opening, left = threading.Event(), threading.Event()

    class Hanging:
        def __init__(self, *_: object) -> None:
            pass

        def __enter__(self) -> None:
            opening.set()
            left.wait(60)
            raise SourceLostError("gone")

        def __exit__(self, *_: object) -> None:
            """Never called."""

    monkeypatch.setattr(connection_module, "VideoSource", Hanging)
    connection = Connection(SourceConfig(url="/dev/video7"))
    connection.start()
    assert opening.wait(60)
    connection.abandon()
    left.set()
    connection.join()
    part = weakref.ref(connection)
    del connection
    wait_until(lambda: part() is None)


def test_a_connection_returns_the_memory_of_its_decoder(make_clip, free_port, monkeypatch) -> None:
    given_back: list[str] = []
    monkeypatch.setattr(
        connection_module,
        "give_back_memory",
        lambda: given_back.append(threading.current_thread().name),
    )
    for url, times in ((str(make_clip()), 1), (f"rtsp://127.0.0.1:{free_port}/cam", 0)):
        given_back.clear()
        connection = Connection(SourceConfig(url=url, name="cam"))
        connection.start()
        take_all(connection)
        connection.join()
        assert given_back == ["read cam"] * times


def test_an_rtsp_host_is_probed_and_others_are_not() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        probe_tcp(f"rtsp://admin:p@ss/word@127.0.0.1:{port}/cam?x=1")
        listener.settimeout(60)
        listener.accept()[0].close()
        listener.settimeout(0.1)
        probe_tcp(f"http://127.0.0.1:{port}/cam")
        with pytest.raises(TimeoutError):
            listener.accept()


def test_a_probe_times_out_after_a_second() -> None:
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        port = full.getsockname()[1]
        waiting = [socket.socket() for _ in range(3)]
        for client in waiting:
            client.setblocking(False)
            client.connect_ex(("127.0.0.1", port))
        began_s = time.monotonic()
        with pytest.raises(InputError, match="no answer within 1 s"):
            probe_tcp(f"rtsp://127.0.0.1:{port}/cam")
        assert time.monotonic() - began_s < 30.0
        for client in waiting:
            client.close()


@pytest.mark.parametrize("url", ["rtsp://127.0.0.1:99999/cam", "rtsp:///cam", "rtsp://[::1/cam"])
def test_a_malformed_url_is_refused(url: str) -> None:
    with pytest.raises(InputError, match="check the address"):
        probe_tcp(url)


def test_reads_that_hang_are_abandoned_up_to_a_maximum(monkeypatch) -> None:
    released = threading.Event()

    class Hanging:
        """As FFmpeg does in the name service and in some camera drivers."""

        def __init__(self, *_: object) -> None:
            pass

        def __enter__(self) -> None:
            released.wait(60)
            raise InputError("released")

        def __exit__(self, *_: object) -> None:
            """Never called."""

    monkeypatch.setattr(connection_module, "VideoSource", Hanging)
    monkeypatch.setattr(live_source, "OPEN_GRACE_S", 0.0)
    changes: list[StateChange] = []
    stopping = threading.Event()
    config = SourceConfig(url="/dev/video7", name="cam", open_timeout_s=0.05)

    def read() -> None:
        with pytest.raises(live_source.SourceLostError, match="stopped"):
            LiveSource(config, changes.append, stopping).open()

    reader = threading.Thread(target=read)
    reader.start()
    wait_until(lambda: changes and f"{MAX_HANGING} earlier connections hang" in changes[-1].reason)
    time.sleep(0.5)
    assert sum(thread.name == "read cam" for thread in threading.enumerate()) == MAX_HANGING
    released.set()
    wait_until(lambda: "released" in changes[-1].reason)
    stopping.set()
    reader.join(60)
    wait_until(lambda: all(thread.name != "read cam" for thread in threading.enumerate()))
