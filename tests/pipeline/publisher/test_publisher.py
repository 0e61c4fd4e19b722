import time
from socket import AF_UNIX
from socket import socket as posix_socket

import pytest
import zmq
from keyring import new_client
from publishers import NAMES, frame, seen
from witnesses import wait_until

from maskcast.engines.errors import InputError
from maskcast.engines.instances.instances import Instances
from maskcast.pipeline.publisher import publisher as publisher_module
from maskcast.pipeline.publisher.publisher import Publisher
from maskcast.pipeline.wire.message import EventMessage, InstancesMessage, decode
from maskcast.pipeline.wire.server_keys import ServerKeys


@pytest.fixture
def connect():
    """Return a function that connects a plain socket to a publisher."""
    context, made = zmq.Context(), []

    def connect(publisher, prefix="v1/", kind=zmq.SUB, high_water_mark=1000):
        made.append(context.socket(kind))
        made[-1].set(zmq.RCVHWM, high_water_mark)
        made[-1].set(zmq.RCVTIMEO, 60_000)
        if kind == zmq.SUB:
            made[-1].subscribe(prefix)
        made[-1].connect(publisher.endpoint)
        return made[-1]

    yield connect
    for one in made:
        one.close(linger=0)
    context.term()


def receive(socket):
    return decode(socket.recv_multipart())


def silent(socket):
    return not socket.poll(150)


def test_a_frame_arrives_with_its_header(publisher, connect):
    socket = connect(publisher)
    assert publisher.wait_for_subscribers(1, 60, ["cam1"])
    one = frame(index=7)
    one.timeline.begin("infer")
    one.timeline.end("infer")
    one.timeline.begin("publish")
    sent = publisher.publish(one, seen(), drops={"decode": {"replaced": 4}}, jpeg=b"jpeg")
    labels, message = receive(socket), receive(socket)
    assert labels.header.data["names"] == list(NAMES)
    assert isinstance(message, InstancesMessage)
    header = message.header
    assert (header.seq, header.publish_ns) == sent
    assert (header.index, header.pts_s, header.capture_ns) == (7, 7 / 25, one.capture_ns)
    assert (header.count, header.masks, header.clock) == (2, "crop_u8", "receipt")
    assert header.drops == {"decode": {"replaced": 4}}
    assert list(header.stage_ms) == ["infer"]
    assert 0 <= header.stage_ms["infer"] < 1000
    assert header.labels == labels.header.data["id"]
    assert message.jpeg == b"jpeg"


def test_sequence_numbers_count_each_source_from_0_even_without_subscribers(publisher, connect):
    for index in range(5):
        assert publisher.publish(frame("a", index), seen()).seq == index
    socket = connect(publisher, "v1/a/instances")
    assert publisher.wait_for_subscribers(1, 60, ["a"])
    assert publisher.publish(frame("b"), seen()).seq == 0
    assert publisher.publish(frame("a", 5), seen()).seq == 5
    assert receive(socket).header.seq == 5


def test_an_image_is_encoded_for_each_frame_that_is_sent_from_the_first_one(publisher, connect):
    encoded = []

    def encode():
        encoded.append(b"jpeg")
        return encoded[-1]

    publisher.publish(frame(), seen(), jpeg=encode)
    assert not encoded
    socket = connect(publisher, "v1/cam1/instances")
    # Nothing reads the subscription before the frame that it is in time for.
    wait_until(lambda: publisher.publish(frame(), seen(), jpeg=encode) and encoded, 60)
    assert receive(socket).jpeg == b"jpeg"
    assert len(encoded) == 1


def test_instances_without_masks_are_sent_in_format_none(publisher, connect):
    socket = connect(publisher, "v1/cam1/instances")
    publisher.wait_for_subscribers(1, 60, ["cam1"])
    boxes = seen()
    publisher.publish(
        frame(), Instances(64, 48, boxes.boxes, boxes.scores, boxes.labels, masks=None)
    )
    assert receive(socket).header.masks == "none"


def test_a_late_subscriber_receives_only_the_last_labels_size_and_state(publisher, connect):
    publisher.event("cam1", "state", state="connecting")
    publisher.event("cam1", "size", width=640, height=480)
    publisher.event("cam1", "corrupt", packets=3)
    publisher.event("cam1", "state", state="running")
    publisher.event("cam1", "size", width=1280, height=720)
    socket = connect(publisher)
    assert publisher.wait_for_subscribers(1, 60, ["cam1"])
    events = {
        message.header.event: message.header for message in (receive(socket) for _ in range(3))
    }
    assert events["labels"].data["names"] == list(NAMES)
    assert events["size"].data == {"width": 1280, "height": 720}
    assert events["state"].data == {"state": "running"}
    assert (events["labels"].seq, events["state"].seq, events["size"].seq) == (0, 4, 5)
    assert silent(socket)


def test_a_subscriber_to_one_source_receives_its_events_only(publisher, connect):
    publisher.event("cam1", "state", state="running")
    publisher.event("cam10", "state", state="running")
    socket = connect(publisher, "v1/cam1/")
    assert publisher.wait_for_subscribers(1, 60, ["cam1"])
    assert {receive(socket).source for _ in range(2)} == {"cam1"}
    assert silent(socket)


def test_many_subscribers_at_once_cause_one_repetition(publisher, connect, monkeypatch):
    monkeypatch.setattr(publisher_module, "DRAIN_S", 60.0)  # a pause of 5 ms would end the reading
    publisher.event("cam1", "state", state="running")
    sockets = [connect(publisher, "v1/cam1/") for _ in range(20)]
    wait_until(lambda: publisher._outlets[0].peers == 20)
    time.sleep(1)  # all subscriptions arrive before the first is read
    publisher.answer_subscriptions()
    assert publisher.subscribers("cam1") == 20
    for socket in sockets:
        assert {receive(socket).header.event for _ in range(2)} == {"labels", "state"}
    assert all(map(silent, sockets[:2]))


def test_events_of_sources_that_have_ended_come_last(publisher, connect):
    publisher.event("a", "ended", reason="end of stream")
    publisher.event("b", "state", state="running")
    socket = connect(publisher)
    assert publisher.wait_for_subscribers(1, 60, ["a"])
    events = [receive(socket) for _ in range(4)]
    assert all(isinstance(event, EventMessage) for event in events)
    assert [event.header.event for event in events].index("ended") == 3


def test_a_source_that_runs_again_has_not_ended(publisher, connect):
    publisher.event("a", "ended")
    publisher.event("a", "state", state="running")
    socket = connect(publisher)
    publisher.wait_for_subscribers(1, 60, ["a"])
    assert {receive(socket).header.event for _ in range(2)} == {"labels", "state"}


def test_events_state_how_many_instances_messages_were_sent_before(publisher, connect):
    for index in range(3):
        publisher.publish(frame(index=index), seen())
    publisher.event("cam1", "ended")
    socket = connect(publisher)
    publisher.wait_for_subscribers(1, 60, ["cam1"])
    assert {m.header.event: m.header.sent for m in (receive(socket), receive(socket))} == {
        "labels": 0,
        "ended": 3,
    }


def test_subscribers_are_counted_by_source_and_forgotten_when_they_leave(publisher, connect):
    everything = connect(publisher)
    one = connect(publisher, "v1/cam1/")
    same = connect(publisher, "v1/cam1/")
    assert publisher.wait_for_subscribers(3, 60, ["cam1"])
    assert publisher.subscribers("cam10") == 1
    same.close()
    one.close()
    wait_until(lambda: publisher.answer_subscriptions() or publisher.subscribers("cam1") == 1)
    assert not everything.closed


def test_waiting_for_subscribers_has_an_end(publisher, connect):
    start = time.monotonic()
    assert not publisher.wait_for_subscribers(1, 0.2, ["cam1"])
    assert 0.2 <= time.monotonic() - start < 30
    connect(publisher, "v1/cam1/")
    assert not publisher.wait_for_subscribers(1, 0.2, ["cam1", "cam2"])


def test_a_subscriber_that_reads_nothing_never_makes_the_publisher_wait(connect):
    with Publisher("tcp://127.0.0.1:0", NAMES, high_water_mark=4) as publisher:
        connect(publisher, high_water_mark=1)
        assert publisher.wait_for_subscribers(1, 60, ["cam1"])
        many, slowest = seen(100), 0.0
        for index in range(500):
            start = time.monotonic()
            publisher.publish(frame(index=index), many)
            slowest = max(slowest, time.monotonic() - start)
        assert slowest < 10
        start = time.monotonic()
    assert time.monotonic() - start < 30


def test_what_is_no_subscription_is_ignored(publisher, connect):
    rude = connect(publisher, kind=zmq.XSUB)
    socket = connect(publisher, "v1/cam1/instances")
    publisher.wait_for_subscribers(1, 60, ["cam1"])
    rude.send(b"")
    rude.send(b"hello")
    rude.send(b"\x00never subscribed")
    rude.send(b"x" * 1_000_000)
    time.sleep(0.1)
    publisher.publish(frame(), seen())
    assert receive(socket).header.seq == 0
    assert publisher.subscribers("cam1") == 1


@pytest.mark.parametrize("endpoint", ["tcp://127.0.0.1:0", "tcp://127.0.0.1:*", "tcp://*:*"])
def test_a_free_port_is_reported(endpoint):
    with Publisher(endpoint, NAMES) as publisher:
        assert int(publisher.endpoint.rpartition(":")[2]) > 0


@pytest.mark.parametrize(
    ("endpoint", "warned"),
    [
        ("tcp://*:0", True),
        ("tcp://0.0.0.0:0", True),
        ("tcp://[::]:0", True),
        ("tcp://127.0.0.1:0", False),
        ("tcp://localhost:0", False),
        ("tcp://lo:0", False),
        ("tcp://[::1]:0", False),
    ],
)
def test_publishing_to_the_network_without_keys_is_one_warning(endpoint, warned, caplog, tmp_path):
    with Publisher(endpoint, NAMES):
        pass
    assert caplog.messages == ["publishing_without_keys"] * warned
    assert all("maskcast keys new" in record.fields["advice"] for record in caplog.records)
    caplog.clear()
    new_client(tmp_path / "server")
    keys = ServerKeys.read(tmp_path / "server.key_secret", [f"{tmp_path}/server.key"])
    with Publisher(endpoint, NAMES, keys=keys):
        pass
    assert not caplog.messages


def test_a_socket_file_works_and_is_gone_afterwards(tmp_path, connect):
    path = tmp_path / "maskcast.sock"
    with Publisher(f"ipc://{path}", NAMES) as publisher:
        assert publisher.endpoint == f"ipc://{path}"
        socket = connect(publisher, "v1/cam1/instances")
        assert publisher.wait_for_subscribers(1, 60, ["cam1"])
        publisher.publish(frame(), seen())
        assert receive(socket).header.seq == 0
    assert not path.exists()


@pytest.mark.parametrize("scheme", ["tcp", "ipc"])
def test_an_endpoint_in_use_is_an_input_error_of_one_line(scheme, tmp_path):
    endpoint = {"tcp": "tcp://127.0.0.1:0", "ipc": f"ipc://{tmp_path}/s"}[scheme]
    with Publisher(endpoint, NAMES) as first:
        with pytest.raises(InputError, match="in use") as caught:
            Publisher(first.endpoint, NAMES)
        assert "\n" not in str(caught.value)
        assert first.endpoint in str(caught.value)


def test_a_socket_file_without_a_listener_is_taken_over(tmp_path):
    path = tmp_path / "s"
    with posix_socket(AF_UNIX) as dead:
        dead.bind(str(path))
    with Publisher(f"ipc://{path}", NAMES) as publisher:
        publisher.event("cam1", "state", state="running")


@pytest.mark.parametrize(
    "endpoint",
    [
        "",
        "5555",
        "http://127.0.0.1:5555",
        "inproc://x",
        "tcp://",
        "tcp://127.0.0.1:99999",
        "tcp://127.0.0.1",
        "tcp://198.51.100.7:5555",
        "tcp://no-such-interface:5555",
        "ipc:///no/such/folder/socket",
        "ipc:///tmp/" + "x" * 103,
    ],
)
def test_an_endpoint_that_cannot_be_bound_is_an_input_error_of_one_line(endpoint):
    with pytest.raises(InputError, match=r"(expected|use) tcp://") as caught:
        Publisher(endpoint, NAMES)
    assert "\n" not in str(caught.value)


def test_a_source_name_that_no_topic_can_contain_is_an_input_error(publisher):
    with pytest.raises(InputError, match="source name"):
        publisher.event("a/b", "state")


def test_removed_sources_are_forgotten_but_their_numbers_continue(monkeypatch):
    monkeypatch.setattr(publisher_module, "MAX_REMOVED", 100)
    with Publisher("tcp://127.0.0.1:0", NAMES) as publisher:
        for number in range(1000):
            assert publisher.publish(frame(f"x{number}"), seen()).seq == 0
            publisher.event(f"x{number}", "ended", reason="removed")
            publisher.forget(f"x{number}")
        assert publisher.publish(frame("x999"), seen()).seq == 1
        assert len(publisher._streams) + len(publisher._removed) <= 101
