import contextlib
import logging
import socket as posix_socket
import threading
import time

import pytest
import zmq
from keyring import admit, new_client
from publishers import frame, seen
from witnesses import wait_until

from maskcast.engines.errors import InputError
from maskcast.pipeline.publisher import peers
from maskcast.pipeline.publisher.peers import LOCAL, UNKNOWN
from maskcast.pipeline.publisher.publisher import Publisher
from maskcast.pipeline.subscriber.subscribe import subscribe
from maskcast.pipeline.wire.server_keys import ServerKeys


@pytest.fixture
def keys(tmp_path):
    """Return a function that makes a key pair by name, and returns its path without suffix."""

    def make(name):
        return new_client(tmp_path / name)

    return make


@pytest.fixture
def server(keys):
    return keys("server")


@pytest.fixture
def friend(keys):
    return keys("friend")


@pytest.fixture(params=["tcp", "ipc"])
def publisher(request, server, friend, tmp_path):
    endpoint = {"tcp": "tcp://127.0.0.1:0", "ipc": f"ipc://{tmp_path}/socket"}[request.param]
    allowed = ServerKeys.read(f"{server}.key_secret", [f"{friend}.key"])
    with Publisher(endpoint, ("background",), keys=allowed) as publisher:
        yield publisher


def publish(publisher, index=0):
    publisher.publish(frame(index=index), seen(0))


@contextlib.contextmanager
def plain_peer(publisher):
    """Connect by TCP and complete ZeroMQ's handshake as a SUB socket."""
    port = int(publisher.endpoint.rpartition(":")[2])
    with posix_socket.create_connection(("127.0.0.1", port)) as peer:
        peer.sendall(b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32))
        greeting = 64
        while greeting:
            greeting -= len(peer.recv(greeting))
        ready = b"\x05READY" + b"\x0bSocket-Type" + (3).to_bytes(4, "big") + b"SUB"
        peer.sendall(b"\x04" + bytes([len(ready)]) + ready)
        yield peer


def refusals(caplog):
    refused = [r.fields for r in caplog.records if r.getMessage() == "subscriber_refused"]
    return [f"{values['address']}: {values['reason']}" for values in refused]


def wait_for_refusal(publisher, caplog):
    wait_until(lambda: publish(publisher) or refusals(caplog))


def test_a_client_with_an_allowed_key_receives_everything(publisher, server, friend, caplog):
    with subscribe(
        publisher.endpoint,
        policy="all",
        server_key=f"{server}.key",
        client_key=f"{friend}.key_secret",
    ) as frames:
        assert publisher.wait_for_subscribers(1, 60, ["cam1"])
        for index in range(20):
            publish(publisher, index)
        assert [frames.receive().seq for _ in range(20)] == list(range(20))
    assert not refusals(caplog)


@pytest.mark.parametrize("wrong", ["client", "server", "none"])
def test_a_client_with_a_wrong_key_or_none_receives_nothing_and_is_logged_once(
    publisher, server, friend, keys, caplog, wrong
):
    stranger = keys("stranger")
    given = {
        "client": {"server_key": f"{server}.key", "client_key": f"{stranger}.key_secret"},
        "server": {"server_key": f"{stranger}.key", "client_key": f"{friend}.key_secret"},
        "none": {},
    }[wrong]
    with caplog.at_level(logging.WARNING), subscribe(publisher.endpoint, **given) as frames:
        wait_for_refusal(publisher, caplog)

        def is_reported() -> bool:
            publish(publisher)
            with pytest.raises(TimeoutError) as caught:
                frames.receive(0.2)
            return "key" in str(caught.value)

        wait_until(is_reported)
        time.sleep(0.7)  # it connects again several times
        assert frames.tally.received == frames.tally.malformed == 0
    assert publisher.subscribers("cam1") == 0
    shown = refusals(caplog)
    by = "127.0.0.1" if publisher.endpoint.startswith("tcp") else LOCAL
    assert shown
    assert len(set(shown)) == len(shown)
    for line in shown:
        assert by in line or UNKNOWN in line
        assert ("allowed" in line) == (wrong == "client")


def test_strangers_from_many_addresses_do_not_fill_the_log(server, friend, caplog, monkeypatch):
    monkeypatch.setattr(peers, "MAX_ADDRESSES", 3)
    allowed = ServerKeys.read(f"{server}.key_secret", [f"{friend}.key"])
    with Publisher("tcp://127.0.0.1:0", ("background",), keys=allowed) as publisher:
        port = int(publisher.endpoint.rpartition(":")[2])
        for number in range(1, 9):
            source = (f"127.0.0.{number}", 0)
            stranger = posix_socket.create_connection(("127.0.0.1", port), 5, source)
            with stranger, contextlib.suppress(ConnectionError):
                wait_until(lambda: publisher._outlets[0].peers)  # its address is known
                stranger.sendall(b"\xff" * 64)
                while stranger.recv(4096):
                    pass
            wait_until(lambda: not publisher._outlets[0].peers)
        wait_until(lambda: len(refusals(caplog)) >= 4)
        time.sleep(0.3)
    *named, last = refusals(caplog)
    assert len(set(named)) == len(named) == 3
    assert "more than 3" in last


@pytest.mark.parametrize("publisher", ["tcp"], indirect=True)
def test_garbage_instead_of_a_handshake_affects_no_other_peer(publisher, server, friend):
    port = int(publisher.endpoint.rpartition(":")[2])
    for garbage in (
        b"",
        b"GET / HTTP/1.1\r\n\r\n",
        b"\xff" * 5000,
        b"\xff" + bytes(8) + b"\x7f\x03",
    ):
        with posix_socket.create_connection(("127.0.0.1", port)) as stranger:
            stranger.sendall(garbage)
    friendly = {"server_key": f"{server}.key", "client_key": f"{friend}.key_secret"}
    with subscribe(publisher.endpoint, **friendly) as frames:
        assert publisher.wait_for_subscribers(1, 60, ["cam1"])
        publish(publisher)
        assert frames.receive().seq == 0


def test_closing_ends_the_thread_too(server, friend):
    allowed = ServerKeys.read(f"{server}.key_secret", [f"{friend}.key"])
    endpoint, threads = "tcp://127.0.0.1:0", threading.active_count()
    for _ in range(3):
        start = time.monotonic()
        with Publisher(endpoint, ("background",), keys=allowed) as publisher:
            endpoint = publisher.endpoint
        assert time.monotonic() - start < 30
        assert threading.active_count() == threads
    with pytest.raises(
        InputError, match=r"5555: cannot assign requested address; use tcp://\*:5555"
    ):
        Publisher("tcp://198.51.100.7:5555", ("background",), keys=allowed)


def test_a_key_that_is_added_works_without_a_restart(server, friend, keys, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    folder = tmp_path / "clients"
    folder.mkdir()
    admit(f"{friend}.key", folder)
    newcomer = keys("newcomer")
    given = {"server_key": f"{server}.key", "client_key": f"{newcomer}.key_secret"}
    allowed = ServerKeys.read(f"{server}.key_secret", folder)
    with (
        Publisher("tcp://127.0.0.1:0", ("background",), keys=allowed) as publisher,
        subscribe(publisher.endpoint, policy="all", **given) as frames,
    ):
        wait_for_refusal(publisher, caplog)
        admit(f"{newcomer}.key", folder)
        assert publisher.wait_for_subscribers(1, 60, ["cam1"])
        publish(publisher)
        assert frames.receive().source == "cam1"


def test_a_key_that_is_withdrawn_stops_working_and_others_continue(
    server, friend, keys, tmp_path, caplog
):
    folder = tmp_path / "clients"
    folder.mkdir()
    admit(f"{friend}.key", folder)
    former = keys("former")
    admit(f"{former}.key", folder)
    allowed = ServerKeys.read(f"{server}.key_secret", folder)

    def connect(name):
        return subscribe(
            publisher.endpoint,
            policy="all",
            server_key=f"{server}.key",
            client_key=f"{name}.key_secret",
        )

    with (
        Publisher("tcp://127.0.0.1:0", ("background",), keys=allowed) as publisher,
        connect(friend) as friendly,
        connect(former) as withdrawn,
    ):
        assert publisher.wait_for_subscribers(2, 60, ["cam1"])
        (folder / "former.key").unlink()
        wait_for_refusal(publisher, caplog)
        assert publisher.wait_for_subscribers(1, 60, ["cam1"])
        before, seen_before = friendly.tally.received, withdrawn.tally.received

        def friend_receives():
            publish(publisher)
            return friendly.tally.received > before

        wait_until(friend_receives)
        assert publisher.subscribers("cam1") == 1
        assert withdrawn.tally.received == seen_before


def has_labels(frames):
    """Return whether a frame has arrived after the labels."""
    try:
        return frames.receive(0.2).label_names != ()
    except TimeoutError:
        return False


def test_a_peer_that_floods_subscriptions_is_disconnected_and_delays_no_other(caplog):
    def flood(peer):
        # Alternately subscribed and cancelled: libzmq queues each of them.
        pairs = (b"\x00\x08\x01v1/cam2" + b"\x00\x08\x00v1/cam2") * 1000
        with contextlib.suppress(OSError):
            while True:
                peer.sendall(pairs)

    with Publisher("tcp://127.0.0.1:0", ("background",)) as publisher:
        with plain_peer(publisher) as peer:
            flooding = threading.Thread(target=flood, args=(peer,))
            flooding.start()
            backlog = False
            while flooding.is_alive():
                publish(publisher)
                backlog = backlog or publisher.has_backlog
                # What has not been read may be a subscription: nobody has to wait.
                assert publisher.subscribers("cam1") == publisher.has_backlog
            flooding.join()
        assert backlog
        assert caplog.messages == ["subscriber_flood"]
        with subscribe(publisher.endpoint, "cam1") as frames:  # once it is no longer blocked
            # Until the last of the flood has been read, it may be cut off once more.
            wait_until(lambda: publish(publisher) or has_labels(frames), 60)


@pytest.mark.parametrize("transport", ["tcp", "ipc"])
def test_a_peer_whose_subscription_is_too_long_is_reported_and_others_are_not(
    transport, tmp_path, caplog
):
    endpoint = {"tcp": "tcp://127.0.0.1:0", "ipc": f"ipc://{tmp_path}/socket"}[transport]
    with Publisher(endpoint, ("background",)) as publisher:
        for _ in range(3):
            with subscribe(publisher.endpoint, "cam1"):
                assert publisher.wait_for_subscribers(1, 60, ["cam1"])
        assert publisher.cut_off == 0
        with zmq.Context() as context, context.socket(zmq.SUB) as subscriber:
            subscriber.linger = 0
            subscriber.connect(publisher.endpoint)
            subscriber.subscribe(b"v1/" + b"x" * 200)
            # It subscribes again at each reconnection, while its program reads.
            wait_until(lambda: subscriber.poll(50) or publisher.cut_off >= 2, 60)
        (record,) = (r for r in caplog.records if r.getMessage() == "subscriber_cut_off")
        assert record.fields["address"] == {"tcp": "127.0.0.1", "ipc": LOCAL}[transport]
        assert "128 bytes" in record.fields["reason"]


@pytest.mark.parametrize("transport", ["tcp", "ipc"])
def test_a_peer_that_left_before_it_was_looked_up_was_not_cut_off(
    transport, tmp_path, monkeypatch, caplog
):
    endpoint = {"tcp": "tcp://127.0.0.1:0", "ipc": f"ipc://{tmp_path}/socket"}[transport]
    may_look_up, looked_up = threading.Event(), []
    look_up = peers.look_up

    def look_up_late(handle, local):
        may_look_up.wait(60)
        looked_up.append(handle)
        return look_up(handle, local)

    monkeypatch.setattr(peers, "look_up", look_up_late)
    with Publisher(endpoint, ("background",)) as publisher:
        with subscribe(publisher.endpoint, "cam1"):
            assert publisher.wait_for_subscribers(1, 60, ["cam1"])
        wait_until(lambda: publish(publisher) or publisher.subscribers("cam1") == 0, 60)
        # libzmq has closed the connection; the next one gets its number.
        with subscribe(publisher.endpoint, "cam2"):
            assert publisher.wait_for_subscribers(1, 60, ["cam2"])
            may_look_up.set()
            wait_until(lambda: len(looked_up) == 2, 60)
        with subscribe(publisher.endpoint, "cam3"):
            wait_until(lambda: len(looked_up) == 3, 60)
        assert looked_up[0] == looked_up[1]
        assert publisher.cut_off == 0
    assert not caplog.messages


def test_a_peer_that_vanishes_or_does_not_answer_was_not_cut_off(caplog, monkeypatch):
    monkeypatch.setattr(peers, "HELD_CONNECTIONS", 1)
    with Publisher("tcp://127.0.0.1:0", ("background",)) as publisher:
        with plain_peer(publisher) as peer:
            peer.sendall(b"\x00\x08\x01v1/cam1")
            assert publisher.wait_for_subscribers(1, 60, ["cam1"])
            with plain_peer(publisher) as other:
                other.sendall(b"\x00\x08\x01v1/cam1")
                assert publisher.wait_for_subscribers(2, 60, ["cam1"])
            wait_until(
                lambda: publisher.answer_subscriptions() or publisher.subscribers("cam1") == 1, 60
            )
            # The first one answers no heartbeat, and is disconnected.
            wait_until(
                lambda: publisher.answer_subscriptions() or publisher.subscribers("cam1") == 0, 60
            )
            assert peer.recv(1 << 16)
        assert publisher.cut_off == 0
    assert "subscriber_cut_off" not in caplog.messages


def test_one_key_without_the_other_is_refused(server):
    with pytest.raises(InputError, match="together"):
        subscribe("tcp://127.0.0.1:9", server_key=f"{server}.key")


@pytest.mark.parametrize(("endpoint", "waits"), [("tcp://127.0.0.1:0", True), ("ipc", False)])
def test_only_remote_peers_are_checked_periodically(endpoint, waits, tmp_path, monkeypatch):
    intervals_ms = []
    of_guard = peers.PeerGuard._interval_ms

    def record(guard):
        if guard.connected:
            intervals_ms.append(of_guard(guard))
        return of_guard(guard)

    monkeypatch.setattr(peers.PeerGuard, "_interval_ms", record)
    address = f"ipc://{tmp_path}/socket" if endpoint == "ipc" else endpoint
    with (
        Publisher(address, ("background",)) as publisher,
        subscribe(publisher.endpoint, timeout_s=60),
    ):
        wait_until(lambda: publisher.wait_for_subscribers(1, 0.1, ["cam"]) and intervals_ms)
    assert (intervals_ms[0] is not None) is waits
