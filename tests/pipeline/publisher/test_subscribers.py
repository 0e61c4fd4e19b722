"""Rights per source, with real sockets: every subscription is narrowed to what its key may see."""

import contextlib
import time

import pytest
import zmq
from keyring import admit, allow, new_client
from publishers import NAMES, frame, seen
from witnesses import wait_until

from maskcast.pipeline.publisher.publisher import Publisher
from maskcast.pipeline.subscriber.subscribe import subscribe
from maskcast.pipeline.wire.curve import ClientKeys, new_keys
from maskcast.pipeline.wire.message import decode_header
from maskcast.pipeline.wire.server_keys import ServerKeys

SOURCES = ("door", "door2", "yard1", "yard2", "cellar")


@pytest.fixture
def folder(tmp_path):
    """Make keys: "viewer" sees door and yard*, "guest" sees door2, "admin" sees everything."""
    new_keys(tmp_path / "server")
    new_client(tmp_path / "clients/viewer", "door", "yard*")
    new_client(tmp_path / "clients/guest", "door2")
    new_client(tmp_path / "clients/admin")
    return tmp_path


@pytest.fixture(params=["tcp", "ipc"])
def publisher(request, folder):
    endpoint = {"tcp": "tcp://127.0.0.1:0", "ipc": f"ipc://{folder}/socket"}[request.param]
    keys = ServerKeys.read(folder / "server.key_secret", folder / "clients")
    with Publisher(endpoint, NAMES, keys=keys) as publisher:
        yield publisher


tcp_only = pytest.mark.parametrize("publisher", ["tcp"], indirect=True)


class Client:
    """A plain socket with a client's key, which keeps what it received."""

    def __init__(self, publisher, folder, name, *prefixes, kind=zmq.SUB):
        self._context = zmq.Context()
        self.socket = self._context.socket(kind)
        ClientKeys.read(folder / "server.key", folder / f"clients/{name}.key_secret").apply(
            self.socket
        )
        self.socket.set(zmq.RCVHWM, 100_000)
        for prefix in prefixes:
            self.subscribe(prefix)
        self.socket.connect(publisher.endpoint)
        self.received = []

    def subscribe(self, prefix):
        if self.socket.type == zmq.SUB:
            self.socket.subscribe(prefix)
        else:
            self.socket.send(b"\x01" + prefix)

    def read(self):
        """Return the sources whose instances have arrived since the last call."""
        received = set()
        with contextlib.suppress(zmq.Again):
            while True:
                source, header = decode_header(self.socket.recv_multipart(zmq.DONTWAIT))
                self.received.append((source, header))
                if hasattr(header, "index"):
                    received.add(source)
        return received

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._context.destroy(linger=0)


def publish(publisher, *sources):
    for source in sources or SOURCES:
        publisher.publish(frame(source), seen())


def sees(publisher, client, *sources):
    """Publish all sources until a client receives exactly these, several times in a row."""
    in_a_row = 0

    def is_so():
        nonlocal in_a_row
        client.read()
        for _ in range(10):
            publish(publisher)
        time.sleep(0.05)
        in_a_row = in_a_row + 1 if client.read() == {*sources} else 0
        return in_a_row == 3

    wait_until(is_so)


@pytest.mark.parametrize(
    ("prefixes", "received"),
    [
        ([b""], {"door", "yard1", "yard2"}),
        ([b"v1/"], {"door", "yard1", "yard2"}),
        ([b"v1/door"], {"door"}),
        ([b"v1/door/instances"], {"door"}),
        ([b"v1/cellar/", b"v1/yard2/"], {"yard2"}),
        ([b"v1/door2/", b"v1/cellar/", b"v1/y"], {"yard1", "yard2"}),
    ],
)
@pytest.mark.parametrize("kind", [zmq.SUB, zmq.XSUB])
@tcp_only
def test_a_client_receives_the_permitted_part_of_its_subscriptions(
    publisher, folder, prefixes, received, kind
):
    with Client(publisher, folder, "viewer", *prefixes, kind=kind) as client:
        sees(publisher, client, *received)
        events = {source for source, header in client.received if not hasattr(header, "index")}
        assert events <= {"door", "yard1", "yard2"}


def test_clients_with_different_rights_share_an_endpoint(publisher, folder):
    with (
        Client(publisher, folder, "viewer", b"") as viewer,
        Client(publisher, folder, "guest", b"") as guest,
        Client(publisher, folder, "admin", b"") as admin,
    ):
        sees(publisher, viewer, "door", "yard1", "yard2")
        sees(publisher, guest, "door2")
        sees(publisher, admin, *SOURCES)
        assert [publisher.subscribers(source) for source in SOURCES] == [2, 2, 2, 2, 1]
    wait_until(lambda: not any(map(publisher.subscribers, SOURCES)))


@tcp_only
def test_nothing_is_encoded_for_a_client_that_may_not_see_it(publisher, folder):
    with Client(publisher, folder, "guest", b"v1/door/", b"v1/door2/"):
        assert publisher.wait_for_subscribers(1, 60, ["door2"])
        assert publisher.subscribers("door") == 0


@tcp_only
def test_a_source_that_comes_later_is_seen_if_its_name_is_permitted(publisher, folder):
    with Client(publisher, folder, "viewer", b"") as client:
        sees(publisher, client, "door", "yard1", "yard2")

        def is_seen():
            publish(publisher, "yard7", "zoo")
            return "yard7" in client.read()

        wait_until(is_seen)
        assert "zoo" not in {source for source, _ in client.received}


@tcp_only
def test_a_new_subscriber_learns_the_state_of_permitted_sources_only(publisher, folder):
    for source in SOURCES:
        publisher.event(source, "state", state="streaming", reconnects=0)
    with Client(publisher, folder, "guest", b"") as client:
        wait_until(lambda: publisher.answer_subscriptions() or client.read() or client.received)
        sees(publisher, client, "door2")
        reported = {
            (source, header.event)
            for source, header in client.received
            if "event" in header.__struct_fields__
        }
        assert reported == {("door2", "labels"), ("door2", "state")}


def test_changed_rights_apply_to_connections_that_exist(publisher, folder):
    with (
        Client(publisher, folder, "viewer", b"") as client,
        Client(publisher, folder, "admin", b"v1/cellar/instances") as other,
    ):
        sees(publisher, client, "door", "yard1", "yard2")
        sees(publisher, other, "cellar")
        allow(folder / "clients/viewer.key", "cellar")
        sees(publisher, client, "cellar")
        allow(folder / "clients/viewer.key", "*")
        sees(publisher, client, *SOURCES)
        (folder / "clients/viewer.yaml").unlink()
        sees(publisher, client)
        allow(folder / "clients/viewer.key", "door")
        wait_until(lambda: reaches(publisher, folder, "viewer", "door"))
        # The other one was never disconnected, so it has lost nothing.
        other.read()
        numbers = [header.seq for _, header in other.received]
        assert numbers == list(range(numbers[0], numbers[-1] + 1))


def reaches(publisher, folder, name, source):
    """Return whether a client that connects now receives this source, and no other."""
    keys = {
        "server_key": folder / "server.key",
        "client_key": folder / f"clients/{name}.key_secret",
    }
    with subscribe(publisher.endpoint, policy="all", **keys) as frames:
        wait_until(lambda: publish(publisher) or frames.tally.received > 5)
        return {frames.receive().source for _ in range(5)} == {source}


@tcp_only
def test_a_client_that_was_granted_nothing_receives_what_it_may_see_later(publisher, folder):
    with (
        Client(publisher, folder, "viewer", b"v1/cellar/") as client,
        Client(publisher, folder, "guest", b"v1/cellar/", b"v1/door2/") as other,
    ):
        sees(publisher, other, "door2")
        sees(publisher, client)
        allow(folder / "clients/viewer.key", "cellar")
        sees(publisher, client, "cellar")
        sees(publisher, other, "door2")


@tcp_only
def test_a_key_that_is_withdrawn_before_its_client_subscribes_is_disconnected(publisher, folder):
    with Client(publisher, folder, "viewer") as client:
        wait_until(lambda: publisher._outlets[0].peers == 1)
        key = (folder / "clients/viewer.key").read_bytes()
        (folder / "clients/viewer.key").unlink()
        wait_until(lambda: len(publisher._outlets[0]._guard._clients.rights) == 2)
        client.subscribe(b"v1/door/")
        wait_until(lambda: publish(publisher) or publisher._outlets[0].peers == 0)
        assert not client.read()
        allow(folder / "clients/viewer.key", "door")
        (folder / "clients/viewer.key").write_bytes(key)
        wait_until(lambda: reaches(publisher, folder, "viewer", "door"))


@tcp_only
def test_rights_that_change_while_a_subscription_is_granted_apply_to_it(publisher, folder):
    guard = publisher._outlets[0]._guard
    read = guard.rights

    def read_slowly(key):
        """Return rights that are changed before the subscription is entered."""
        rights = read(key)
        guard.rights = read
        allow(folder / "clients/viewer.key", "cellar")
        wait_until(lambda: read(key) != rights)
        time.sleep(0.3)
        return rights

    guard.rights = read_slowly
    with Client(publisher, folder, "viewer", b"v1/") as client:
        sees(publisher, client, "cellar")


@tcp_only
def test_rights_are_withdrawn_from_a_connected_client(publisher, folder):
    with Client(publisher, folder, "viewer", b"v1/door/instances") as client:
        sees(publisher, client, "door")
        allow(folder / "clients/viewer.key", "yard1")
        changed_s = last_s = time.monotonic()
        while time.monotonic() < last_s + 2:
            publish(publisher, "door")
            if client.read():
                last_s = time.monotonic()
            assert last_s < changed_s + 60
            time.sleep(0.01)


def test_a_revoked_key_is_disconnected_and_others_stay(publisher, folder):
    with (
        Client(publisher, folder, "viewer", b"") as client,
        Client(publisher, folder, "guest", b"v1/door2/instances") as other,
    ):
        sees(publisher, client, "door", "yard1", "yard2")
        sees(publisher, other, "door2")
        (folder / "clients/viewer.key").unlink()
        sees(publisher, client)
        sees(publisher, other, "door2")
        numbers = [header.seq for _, header in other.received]
        assert numbers == list(range(numbers[0], numbers[-1] + 1))
        assert publisher.subscribers("door") == 0


@tcp_only
def test_a_key_without_rights_receives_nothing_until_it_has_some(publisher, folder, caplog):
    new_keys(folder / "clients/late")
    wait_until(lambda: "client_not_allowed" in caplog.messages)
    secret = folder / "clients/late.key_secret"
    with subscribe(
        publisher.endpoint, policy="all", server_key=folder / "server.key", client_key=secret
    ) as frames:
        wait_until(lambda: publish(publisher) or "subscriber_refused" in caplog.messages)
        assert frames.tally.received == 0
        allow(folder / "clients/late.key", "door")
        wait_until(lambda: publish(publisher) or frames.tally.received > 5)
        assert {frames.receive().source for _ in range(5)} == {"door"}


@tcp_only
def test_a_client_that_is_admitted_later_needs_no_restart(publisher, folder):
    new_client(folder / "anna")
    admit(folder / "anna.key", folder / "clients", "cellar")
    (folder / "anna.key_secret").rename(folder / "clients/anna.key_secret")
    secret = folder / "clients/anna.key_secret"
    with subscribe(
        publisher.endpoint, server_key=folder / "server.key", client_key=secret
    ) as frames:
        wait_until(lambda: publish(publisher) or frames.tally.received > 0)
        assert frames.receive().source == "cellar"


@tcp_only
def test_cancelling_a_subscription_takes_effect_and_never_too_much(publisher, folder):
    with Client(publisher, folder, "admin", b"v1/door/", b"v1/yard1/", kind=zmq.XSUB) as client:
        sees(publisher, client, "door", "yard1")
        client.socket.send(b"\x00v1/door/")
        sees(publisher, client, "yard1")
        assert publisher.subscribers("door") == 0
    with Client(publisher, folder, "viewer", b"", b"v1/door/", kind=zmq.XSUB) as client:
        sees(publisher, client, "door", "yard1", "yard2")
        client.socket.send(b"\x00")
        sees(publisher, client, "door", "yard1", "yard2")


@tcp_only
def test_an_invalid_subscription_gives_no_client_the_rights_of_another(publisher, folder):
    """Such a message makes libzmq mistake one peer for another until everything is read."""
    with (
        Client(publisher, folder, "guest", kind=zmq.XSUB) as rude,
        Client(publisher, folder, "admin", kind=zmq.XSUB) as admin,
        Client(publisher, folder, "viewer", kind=zmq.XSUB) as viewer,
    ):
        for client, prefix in ((rude, b"v1/d"), (admin, b"v1/cellar/"), (viewer, b"v1/y")):
            client.subscribe(prefix)
        sees(publisher, rude, "door2")
        sees(publisher, admin, "cellar")
        for _ in range(20):
            # All of this is waiting when the publisher reads next.
            rude.socket.send(b"hello")
            admin.subscribe(b"v1/")
            rude.subscribe(b"v1/d")
            viewer.subscribe(b"v1/door/")
            rude.socket.send(b"again")
            time.sleep(0.05)
            publish(publisher)
            publish(publisher)
            time.sleep(0.05)
            for client, permitted in (
                (rude, {"door2"}),
                (viewer, {"door", "yard1", "yard2"}),
                (admin, {*SOURCES}),
            ):
                assert client.read() <= permitted
        # They were disconnected, and have subscribed again.
        sees(publisher, admin, *SOURCES)
        sees(publisher, viewer, "door", "yard1", "yard2")
        sees(publisher, rude, "door2")
