import contextlib
import threading
import time

import pytest
import zmq
from keyring import allow, new_client
from publishers import NAMES, frame, seen
from witnesses import wait_until

from maskcast.engines.errors import InputError
from maskcast.pipeline.cluster import gateway as gateway_module
from maskcast.pipeline.cluster.gateway import Gateway
from maskcast.pipeline.publisher import outlet as outlet_module
from maskcast.pipeline.publisher.publisher import Publisher
from maskcast.pipeline.subscriber.connection import receive_parts
from maskcast.pipeline.subscriber.subscribe import subscribe
from maskcast.pipeline.wire.curve import ClientKeys, new_keys
from maskcast.pipeline.wire.message import EventHeader, decode_header
from maskcast.pipeline.wire.server_keys import ServerKeys

ANY = "tcp://127.0.0.1:0"


@pytest.fixture
def gateway():
    with Gateway(ANY, ANY) as gateway:
        yield gateway


def publishing_to(*gateways, keys=None):
    """Return a publisher that is connected to gateways."""
    endpoints = [gateway.sources_endpoint for gateway in gateways]
    return Publisher("", NAMES, gateways=endpoints, gateway_keys=keys)


class Recorder:
    """A subscriber that keeps the parts of all messages, in order."""

    def __init__(self, endpoint, prefix=b"v1/"):
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.SUB)
        self._socket.subscribe(prefix)
        self._socket.connect(endpoint)
        self.messages = []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._context.destroy(linger=0)

    def read(self):
        while (parts := receive_parts(self._socket, 1 << 20, 64)[0]) is not None:
            self.messages.append(parts)
        return self.messages

    def headers(self, source="cam1"):
        decoded = map(decode_header, self.read())
        return [header for name, header in decoded if name == source]


class Feed:
    """Publishes a source's frames, one per call or until a condition is true."""

    def __init__(self, publisher, source="cam1"):
        self.publisher, self.source, self.sent = publisher, source, 0

    def __call__(self):
        self.publisher.publish(frame(self.source, self.sent), seen())
        self.sent += 1

    def until(self, condition, timeout_s=60):
        def step():
            self()
            return condition()

        wait_until(step, timeout_s)


def drain(frames):
    """Return the frames that have arrived."""
    arrived = []
    with contextlib.suppress(TimeoutError):
        while True:
            arrived.append(frames.receive(0))
    return arrived


def newest(frames):
    return drain(frames)[-1]


def test_messages_pass_through_byte_by_byte_and_in_order(gateway):
    with (
        Recorder(gateway.endpoint) as behind,
        Publisher(ANY, NAMES) as publisher,
        Recorder(publisher.endpoint) as direct,
        Gateway(ANY, upstream=[publisher.endpoint]) as second,
        Recorder(second.endpoint) as behind_second,
    ):
        assert publisher.wait_for_subscribers(2, 60, ["cam1"])
        wait_until(lambda: second.stats().subscribers == 1)
        for index in range(50):
            publisher.publish(frame(index=index), seen(index % 3), jpeg=b"\xff\xd8" * index)
            publisher.event("cam1", "state", state="streaming", reconnects=index)
        wait_until(lambda: len(direct.read()) == 101)  # and the label names
        wait_until(lambda: len(behind_second.read()) == 101)
        assert behind_second.messages == direct.messages
        figures = second.stats()
        assert (figures.messages, figures.lost, figures.malformed) == (101, 0, 0)
        assert figures.bytes == sum(len(part) for parts in direct.messages for part in parts)
        assert behind.read() == []


def test_publishers_come_and_go_behind_one_address(gateway):
    with subscribe(gateway.endpoint, policy="all") as frames:
        with publishing_to(gateway) as one, publishing_to(gateway) as other:
            feeds = [Feed(one, "door"), Feed(other, "yard")]
            for feed in feeds:
                feed.until(lambda: frames.tally.received > 0)
            wait_until(lambda: gateway.stats().publishers == 2)
            seen_from = set()
            while seen_from != {"door", "yard"}:
                feeds[0]()
                feeds[1]()
                seen_from.add(frames.receive(60).source)
        wait_until(lambda: gateway.stats().publishers == 0)


def test_a_late_subscriber_receives_the_state_of_every_source_and_nothing_else(gateway):
    with publishing_to(gateway) as publisher:
        feed = Feed(publisher)
        publisher.event("cam1", "state", state="connecting", reconnects=0)
        publisher.event("cam1", "state", state="streaming", reconnects=0)
        publisher.event("cam1", "size", width=64, height=48)
        publisher.event("cam2", "ended", reason="end of stream")
        publisher.event("cam3", "state", state="streaming", reconnects=0)
        publisher.event("cam3", "ended", reason="removed")
        feed.until(lambda: gateway.stats().messages > 0)
        publisher.answer_subscriptions()
        wait_until(lambda: gateway.stats().sources == {"cam1": "streaming", "cam2": "ended"})
        with Recorder(gateway.endpoint) as late:
            wait_until(lambda: len(late.read()) >= 5)
            headers = [(source, header.event) for source, header in map(decode_header, late.read())]
            assert headers == [
                ("cam1", "labels"),
                ("cam1", "state"),
                ("cam1", "size"),
                ("cam2", "labels"),
                ("cam2", "ended"),
            ]
            feed.until(lambda: len(late.read()) > 6)
            assert not any(isinstance(header, EventHeader) for header in late.headers()[3:])
        with subscribe(gateway.endpoint, "cam1") as frames:
            feed.until(lambda: frames.tally.received > 0)
            assert frames.receive(60).label_names == NAMES


def test_a_source_that_moves_is_a_restart_and_the_end_of_its_former_publisher_ends_nothing(gateway):
    with subscribe(gateway.endpoint, "cam1", policy="all") as frames:
        former = publishing_to(gateway)
        Feed(former).until(lambda: frames.tally.received > 0)
        first = newest(frames)
        with publishing_to(gateway) as publisher:
            feed = Feed(publisher)
            moved = []

            def has_moved():
                moved.extend(frame for frame in drain(frames) if frame.publisher != first.publisher)
                return moved

            feed.until(has_moved)
            assert moved[0].restarted
            former.event("cam1", "ended", reason="stopped")
            former.close()
            wait_until(lambda: gateway.stats().publishers == 1)
            assert gateway.stats().sources == {}  # not ended: the new publisher has sent no state
            received = frames.tally.received
            feed.until(lambda: frames.tally.received > received)
            assert newest(frames).publisher != first.publisher
            with subscribe(gateway.endpoint, "cam1") as late:
                feed.until(lambda: late.tally.received > 0)
                assert newest(late).publisher != first.publisher
        assert frames.tally.lost == 0


def test_what_is_lost_on_the_way_is_counted_here_and_by_the_subscriber(gateway):
    with (
        subscribe(gateway.endpoint, "cam1", policy="all") as frames,
        publishing_to(gateway) as publisher,
    ):
        feed = Feed(publisher)
        feed.until(lambda: frames.tally.received > 0)
        connected = publisher._outlets.copy()
        publisher._outlets.clear()  # the network is away
        for _ in range(7):
            feed()
        publisher._outlets.extend(connected)
        feed.until(lambda: frames.tally.lost == 7)
        assert gateway.stats().lost == 7
        wait_until(lambda: frames.tally.received + frames.tally.lost == feed.sent or not feed())


def test_publishers_send_frames_only_while_there_are_subscribers(gateway):
    with publishing_to(gateway) as publisher:
        door, yard = Feed(publisher, "door"), Feed(publisher, "yard")

        def both():
            door()
            yard()
            publisher.event("yard", "state", state="streaming", reconnects=yard.sent)

        wait_until(lambda: both() or len(gateway.stats().sources) > 0)
        assert publisher.subscribers("door") == publisher.subscribers("yard") == 0
        for _ in range(2):
            with subscribe(gateway.endpoint, "door", policy="all") as frames:
                wait_until(lambda: both() or frames.tally.received > 5)
                assert publisher.subscribers("door") == 1
                assert publisher.subscribers("yard") == 0
                assert frames.tally.lost == 0
            wait_until(lambda: both() or not publisher.subscribers("door"))
        events = gateway.stats().messages
        for _ in range(20):
            door()
        publisher.event("door", "state", state="stalled", reconnects=0)
        wait_until(lambda: gateway.stats().sources.get("door") == "stalled")
        assert gateway.stats().messages <= events + 20  # events of "yard" were still on their way
        assert gateway.stats().lost == 0  # frames without a subscriber are not lost


def test_a_gateway_subscribes_to_no_more_than_its_subscribers_may_see(guarded, keys):
    allow(keys / "clients/viewer.key", "door")
    with (
        publishing_to(guarded, keys=client_keys(keys, "publishers/worker")) as publisher,
        subscribe(
            guarded.endpoint,
            server_key=keys / "server.key",
            client_key=keys / "clients/viewer.key_secret",
        ) as frames,
    ):
        door, cellar = Feed(publisher, "door"), Feed(publisher, "cellar")
        wait_until(lambda: door() or cellar() or frames.tally.received > 0)

        def is_asked_for_door_alone():
            door()
            cellar()
            return publisher.subscribers("door") == 1 and not publisher.subscribers("cellar")

        wait_until(is_asked_for_door_alone)


def test_two_gateways_back_each_other_up(gateway):
    other = Gateway(ANY, ANY)
    other.start()
    with (
        publishing_to(gateway, other) as publisher,
        subscribe([gateway.endpoint, other.endpoint], policy="all", timeout_s=60) as frames,
    ):
        feed = Feed(publisher)
        feed.until(lambda: frames.tally.duplicate > 0)
        received = frames.tally.received
        other.stop()
        feed.until(lambda: frames.tally.received > received + 5)
        assert frames.tally.lost == 0
        numbers = [frames.receive().seq for _ in range(received)]
        assert numbers == sorted(set(numbers))


def test_a_gateway_behind_two_passes_each_message_on_once(gateway):
    with (
        Gateway(ANY, ANY) as other,
        Gateway(ANY, upstream=[gateway.endpoint, other.endpoint]) as last,
        publishing_to(gateway, other) as publisher,
        subscribe(last.endpoint, policy="all") as frames,
    ):
        feed = Feed(publisher)
        feed.until(lambda: last.stats().duplicate > 5 and frames.tally.received > 5)
        assert frames.tally.duplicate == 0


@pytest.fixture
def keys(tmp_path):
    """Return a folder with the server's keys, and folders of allowed keys."""
    (tmp_path / "publishers").mkdir()
    for name in ("server", "publishers/worker", "stranger"):
        new_keys(tmp_path / name)
    new_client(tmp_path / "clients/viewer")
    return tmp_path


def server_keys(keys, folder, purpose):
    return ServerKeys.read(keys / "server.key_secret", keys / folder, purpose)


@pytest.fixture
def guarded(keys):
    allowed = server_keys(keys, "clients", "subscribe")
    source_keys = server_keys(keys, "publishers", "publish")
    with Gateway(ANY, ANY, keys=allowed, source_keys=source_keys) as gateway:
        yield gateway


def client_keys(keys, name):
    return ClientKeys.read(keys / "server.key", keys / f"{name}.key_secret")


def test_keys_admit_the_allowed_on_either_side_and_no_others(guarded, keys, caplog):
    def subscribed(name):
        secret = keys / f"{name}.key_secret"
        return subscribe(guarded.endpoint, server_key=keys / "server.key", client_key=secret)

    with (
        publishing_to(guarded, keys=client_keys(keys, "publishers/worker")) as publisher,
        publishing_to(guarded, keys=client_keys(keys, "stranger")) as stranger,
        publishing_to(guarded, keys=client_keys(keys, "clients/viewer")) as viewer,
        publishing_to(guarded) as open_publisher,
        subscribed("clients/viewer") as allowed,
        subscribed("stranger") as refused,
        subscribed("publishers/worker") as worker,
        subscribe(guarded.endpoint) as without_keys,
    ):
        wrong = [Feed(one, "wrong") for one in (stranger, viewer, open_publisher)]

        def step():
            for feed in wrong:
                feed()
            return allowed.tally.received > 5 and {"publisher_refused", "subscriber_refused"} <= {
                *caplog.messages
            }

        Feed(publisher).until(step)
        assert allowed.receive().source == "cam1"
        for nobody in (refused, worker, without_keys):
            assert nobody.tally.received == 0
        assert guarded.stats().sources.keys() == set()  # no state was sent, and nothing of "wrong"
        assert not any(feed.publisher.subscribers("wrong") for feed in wrong)


def test_a_subscriber_of_a_gateway_sees_the_sources_of_its_rights(guarded, keys):
    new_client(keys / "clients/porter", "door")
    new_client(keys / "clients/admin")
    admin, porter = (
        subscribe(
            guarded.endpoint,
            policy="all",
            server_key=keys / "server.key",
            client_key=keys / f"clients/{name}.key_secret",
        )
        for name in ("admin", "porter")
    )
    with (
        publishing_to(guarded, keys=client_keys(keys, "publishers/worker")) as publisher,
        admin,
        porter,
    ):
        door, cellar = Feed(publisher, "door"), Feed(publisher, "cellar")

        def see(frames):
            cellar()
            return {frame.source for frame in drain(frames)}

        door.until(lambda: "cellar" in see(admin))
        seen_by_porter = set()

        def porter_sees():
            seen_by_porter.update(see(porter))
            return seen_by_porter

        door.until(porter_sees)
        for _ in range(20):
            door()
            porter_sees()
        assert seen_by_porter == {"door"}
        allow(keys / "clients/porter.key", "cellar")
        door.until(lambda: see(porter) == {"cellar"})
        (keys / "clients/porter.key").unlink()
        door.until(lambda: guarded.stats().subscribers == 1)
        see(porter)
        door.until(lambda: "cellar" in see(admin))
        assert not see(porter)


def test_a_publisher_whose_key_is_withdrawn_is_disconnected_and_others_continue(guarded, keys):
    new_keys(keys / "publishers/other")
    with (
        publishing_to(guarded, keys=client_keys(keys, "publishers/worker")) as publisher,
        publishing_to(guarded, keys=client_keys(keys, "publishers/other")) as other,
        subscribe(
            guarded.endpoint,
            policy="all",
            server_key=keys / "server.key",
            client_key=keys / "clients/viewer.key_secret",
        ) as frames,
    ):
        door, cellar = Feed(publisher, "door"), Feed(other, "cellar")
        seen = set()

        def see():
            cellar()
            seen.update(frame.source for frame in drain(frames))
            return seen

        (keys / "publishers/worker.key").rename(keys / "worker.key")
        door.until(lambda: "does not allow" in publisher._outlets[0].problem)
        see()
        seen.clear()
        door.until(lambda: "cellar" in see())
        assert seen == {"cellar"}


def test_a_publisher_whose_key_is_allowed_later_needs_no_restart(guarded, keys):
    with publishing_to(guarded, keys=client_keys(keys, "stranger")) as publisher:
        feed = Feed(publisher)
        feed.until(lambda: "does not allow" in publisher._outlets[0].problem)
        (keys / "publishers" / "stranger.key").write_bytes((keys / "stranger.key").read_bytes())
        feed.until(lambda: guarded.stats().messages > 0)


def test_a_gateway_that_does_not_answer_is_reported_once_each_time(monkeypatch, free_port, caplog):
    monkeypatch.setattr(outlet_module, "SILENT_FOR_S", 0.3)
    endpoint = f"tcp://127.0.0.1:{free_port}"

    def reports():
        return caplog.messages.count("gateway_connection_failed")

    with Publisher("", NAMES, gateways=[endpoint]) as publisher:
        for expected in (1, 2):
            wait_until(
                lambda count=expected: publisher.answer_subscriptions() or reports() == count
            )
            time.sleep(0.5)
            publisher.answer_subscriptions()
            assert reports() == expected
            with Gateway(ANY, endpoint) as gateway:
                Feed(publisher).until(lambda: gateway.stats().messages > 0)


def test_a_gateway_connects_upstream_with_its_key(guarded, keys):
    allowed = client_keys(keys, "clients/viewer")
    with (
        Gateway(ANY, upstream=[guarded.endpoint], upstream_keys=allowed) as second,
        publishing_to(guarded, keys=client_keys(keys, "publishers/worker")) as publisher,
        subscribe(second.endpoint) as frames,
    ):
        Feed(publisher).until(lambda: frames.tally.received > 0)


def test_what_is_no_message_is_counted_and_not_passed_on(gateway):
    context = zmq.Context()
    with context, context.socket(zmq.XPUB) as rude, Recorder(gateway.endpoint, b"") as recorder:
        rude.connect(gateway.sources_endpoint)
        assert {rude.recv(), rude.recv()} == {b"\x01v1/*/event", b"\x01"}
        for parts in ([b"v1/"], [b"v1/cam1/instances", b"\xff"], [b"v1/a/b/c", b""], [b"v1/" * 99]):
            rude.send_multipart(parts)
        wait_until(lambda: gateway.stats().malformed == 4)
        with publishing_to(gateway) as publisher:
            Feed(publisher).until(lambda: recorder.read())
        assert {source for source, _ in map(decode_header, recorder.read())} == {"cam1"}


def test_a_flood_of_subscriptions_is_disconnected_and_others_are_served(gateway, caplog):
    context = zmq.Context()
    with context, context.socket(zmq.XSUB) as rude, publishing_to(gateway) as publisher:
        rude.set(zmq.LINGER, 0)
        rude.connect(gateway.endpoint)

        def flood():
            for number in range(200):
                with contextlib.suppress(zmq.Again):
                    rude.send(b"\x01v1/%d/%s" % (number, b"x" * 100), zmq.DONTWAIT)
            return "subscriber_flood" in caplog.messages

        feed = Feed(publisher)
        feed.until(flood)
        with subscribe(gateway.endpoint, "cam1") as frames:  # once the address is not blocked
            feed.until(lambda: frames.tally.received > 0)


def announce(publisher, gateway, count):
    """Announce sources, at most as many at once as the queues hold."""
    for number in range(count):
        publisher.event(f"x{number}", "state", state="streaming")
        if number % 20 == 19:
            wait_until(lambda name=f"x{number}": name in gateway.stats().sources)


def test_the_number_of_sources_is_bounded(monkeypatch):
    monkeypatch.setattr(gateway_module, "MAX_SOURCES", 50)
    with Gateway(ANY, ANY) as gateway, publishing_to(gateway) as publisher:
        Feed(publisher).until(lambda: gateway.stats().messages > 0)
        announce(publisher, gateway, 200)
        assert len(gateway.stats().sources) <= 50


def test_a_late_subscriber_learns_of_more_sources_than_its_queue_holds():
    with Gateway(ANY, ANY, high_water_mark=150) as gateway, publishing_to(gateway) as publisher:
        Feed(publisher).until(lambda: gateway.stats().messages > 0)
        announce(publisher, gateway, 1000)
        with Recorder(gateway.endpoint) as late:
            wait_until(lambda: len(late.read()) >= 2001)
            assert len({source for source, _ in map(decode_header, late.messages)}) == 1001


def test_health_names_an_upstream_endpoint_that_does_not_answer(free_port):
    endpoint = f"tcp://127.0.0.1:{free_port}"
    gateway = Gateway(ANY, upstream=[endpoint])
    with gateway:
        wait_until(lambda: gateway.health().problems == [f"{endpoint}: not connected"])
        with Publisher(endpoint, NAMES) as publisher:
            feed = Feed(publisher)
            feed.until(lambda: gateway.health().healthy)
            publisher.event("cam1", "state", state="streaming")
            wait_until(lambda: gateway.health().sources == {"cam1": "streaming"})
    assert "the gateway has stopped" in gateway.health().problems


def test_an_internal_error_stops_the_gateway_and_is_raised(monkeypatch):
    gateway = Gateway(ANY, ANY)

    def broken(*_):
        raise ZeroDivisionError

    gateway.start()
    with publishing_to(gateway) as publisher:
        monkeypatch.setattr(gateway_module, "decode_header", broken)
        Feed(publisher).until(lambda: not gateway.health().healthy)
    with pytest.raises(ZeroDivisionError):
        gateway.stop()


def test_what_was_sent_before_the_stop_is_passed_on(monkeypatch):
    busy, is_waiting = threading.Event(), threading.Event()
    follow = Gateway._follow

    def slow(gateway, inlets, outlet):  # a machine with too much work
        follow(gateway, inlets, outlet)
        if busy.is_set():
            is_waiting.set()
            gateway._stopping.wait(200)

    monkeypatch.setattr(Gateway, "_follow", slow)
    gateway = Gateway(ANY, ANY)
    gateway.start()
    with Recorder(gateway.endpoint) as recorder:
        with publishing_to(gateway) as publisher:
            Feed(publisher).until(lambda: recorder.headers())
            busy.set()
            assert is_waiting.wait(200)
            for index in range(150):  # more than a batch
                publisher.event("cam1", "state", state="streaming", index=index)
            publisher.event("cam1", "ended", reason="stopped")
        gateway.stop()
        wait_until(lambda: any(getattr(one, "event", "") == "ended" for one in recorder.headers()))
        events = [one for one in recorder.headers() if isinstance(one, EventHeader)]
        assert [one.data["index"] for one in events if "index" in one.data] == list(range(150))


def test_stopping_frees_the_endpoints_and_ends_every_thread():
    threads = threading.active_count()
    gateway = Gateway(ANY, ANY)
    gateway.start()
    endpoints = gateway.endpoint, gateway.sources_endpoint
    gateway.stop()
    gateway.stop()
    assert threading.active_count() == threads
    with Gateway(*endpoints) as again:
        assert (again.endpoint, again.sources_endpoint) == endpoints
        for wrong in (
            lambda: Gateway(again.endpoint, ANY),
            lambda: Gateway(ANY, again.sources_endpoint),
        ):
            with pytest.raises(InputError, match="in use"):
                wrong().start()
    assert threading.active_count() == threads


def test_a_gateway_without_sources_is_refused():
    with pytest.raises(InputError, match="--sources"):
        Gateway(ANY)
    with pytest.raises(InputError, match="invalid endpoint"):
        Gateway(ANY, upstream=["http://cam"]).start()
