"""A publisher with subscribers that stop, misbehave or are many: real processes and sockets."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import zmq
from numpy.typing import NDArray
from publishers import NAMES, frame, seen

import maskcast
from maskcast.pipeline.publisher.publisher import Publisher
from maskcast.pipeline.subscriber.subscribe import subscribe
from maskcast.pipeline.wire import endpoint as endpoint_module

TIMEOUT_S = 60
"""Time for a process to start, or for a message to arrive, on a busy machine."""

READ_ALL = """
import json, sys
from maskcast.pipeline.subscriber.subscribe import subscribe
with subscribe(sys.argv[1], policy="all", timeout_s=300) as frames:
    reported = sum(frame.lost_before for frame in frames)
    tally = frames.tally
print(json.dumps([tally.received, tally.lost, reported]))
"""

SUBSCRIBE_THOUSANDS = """
import sys, time, zmq
socket = zmq.Context().socket(zmq.XSUB)
socket.connect(sys.argv[1])
for number in range(5000):
    socket.send(b"\\x01v1/%d/" % number)
print("subscribed", flush=True)
sys.stdin.read()
"""

READ_NOTHING = """
import sys, zmq
context, sockets = zmq.Context(), []
for _ in range(100):
    sockets.append(context.socket(zmq.SUB))
    sockets[-1].set(zmq.RCVHWM, 1)
    sockets[-1].subscribe(b"v1/cam1/")
    sockets[-1].connect(sys.argv[1])
sys.stdin.read()
"""

PUBLISH_FOREVER = """
import itertools, sys, time
import av, numpy as np
from maskcast.engines.instances.instances import Instances
from maskcast.pipeline.frame import Frame
from maskcast.pipeline.publisher.publisher import Publisher
nothing = Instances(
    64, 48, np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int32), None
)
with Publisher(sys.argv[1], ["background"]) as publisher:
    for index in itertools.count():
        decoded = av.VideoFrame(64, 48)
        publisher.publish(Frame("cam1", index, None, time.time_ns(), decoded), nothing)
        time.sleep(0.005)
"""


class Cost(NamedTuple):
    """The cost of calls of ``publish``: processor time of each, and how often one had to wait.

    Unlike wall-clock time, neither grows when other processes use the processor.
    """

    cpu_ms: NDArray[np.float64]
    waits: int


def publish(publisher, indices, instances, pause_s=0.0005):
    cpu_ms, waits = [], 0
    for index in indices:
        one = frame(index=index)
        before, start = voluntary_switches(), time.thread_time()
        publisher.publish(one, instances)
        cpu_ms.append((time.thread_time() - start) * 1e3)
        waits += voluntary_switches() - before
        time.sleep(pause_s)
    return Cost(np.array(cpu_ms), waits)


def voluntary_switches():
    return resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw


def memory_mb():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


@contextmanager
def process(code, endpoint):
    started = subprocess.Popen(
        [sys.executable, "-c", code, endpoint],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(maskcast.__file__).parents[1])},
    )
    try:
        yield started
    finally:
        started.kill()
        started.communicate()


def finish(publisher, reader):
    """Publish the end until the reader has received it; return its counts."""
    deadline = time.monotonic() + TIMEOUT_S
    while reader.poll() is None and time.monotonic() < deadline:
        publisher.event("cam1", "ended")
        time.sleep(0.05)
    return json.loads(reader.communicate(timeout=TIMEOUT_S)[0])


def wait_until_gone(publisher):
    deadline = time.monotonic() + TIMEOUT_S
    while publisher.subscribers("cam1") and time.monotonic() < deadline:
        publisher.answer_subscriptions()
        time.sleep(0.02)
    assert publisher.subscribers("cam1") == 0


def test_a_stopped_subscriber_costs_neither_time_nor_memory_and_its_losses_are_exact():
    with (
        Publisher("tcp://127.0.0.1:0", NAMES, high_water_mark=32) as publisher,
        process(READ_ALL, publisher.endpoint) as reader,
    ):
        assert publisher.wait_for_subscribers(1, TIMEOUT_S, ["cam1"])
        many = seen(100)
        publish(publisher, range(500), many)
        reader.send_signal(signal.SIGSTOP)
        publish(publisher, range(500, 1000), many)  # fills the queues
        before_mb = memory_mb()
        cost = publish(publisher, range(1000, 3000), many)
        # 2000 messages of 81 kB would be 162 MB; 32 of them are 2.6 MB.
        assert memory_mb() - before_mb < 10
        assert cost.waits <= 200  # of 2000: locks that libzmq's thread held, never a full queue
        assert np.percentile(cost.cpu_ms, 99) < 1
        reader.send_signal(signal.SIGCONT)
        received, lost, reported = finish(publisher, reader)
    assert received + lost == 3000
    assert lost > 1000
    assert reported <= lost


def test_a_peer_that_takes_nothing_is_disconnected_and_its_losses_are_exact_after_it_returns(
    monkeypatch,
):
    monkeypatch.setattr(endpoint_module, "STALLED_AFTER_MS", 1000)
    with (
        Publisher("tcp://127.0.0.1:0", NAMES, high_water_mark=8) as publisher,
        process(READ_ALL, publisher.endpoint) as reader,
    ):
        assert publisher.wait_for_subscribers(1, TIMEOUT_S, ["cam1"])
        many = seen(100)
        publish(publisher, range(10), many)
        reader.send_signal(signal.SIGSTOP)
        publish(publisher, range(10, 510), many)
        wait_until_gone(publisher)
        publish(publisher, range(510, 600), many)
        reader.send_signal(signal.SIGCONT)
        assert publisher.wait_for_subscribers(1, TIMEOUT_S, ["cam1"])
        publish(publisher, range(600, 610), many, pause_s=0.02)
        received, lost, reported = finish(publisher, reader)
    assert received + lost == 610
    assert reported == lost >= 90


def test_a_peer_with_thousands_of_subscriptions_that_leaves_delays_no_other():
    with (
        Publisher("tcp://127.0.0.1:0", NAMES, high_water_mark=2000) as publisher,
        subscribe(publisher.endpoint, "cam1", policy="all", high_water_mark=2000) as frames,
    ):
        assert publisher.wait_for_subscribers(1, TIMEOUT_S, ["cam1"])
        few, cost = seen(10), {}
        cost["alone"] = publish(publisher, range(300), few, pause_s=0.002)
        with process(SUBSCRIBE_THOUSANDS, publisher.endpoint) as rude:
            cost["comes"] = publish(publisher, range(300, 800), few, pause_s=0.002)
            assert rude.stdout.readline() == "subscribed\n"
        cost["leaves"] = publish(publisher, range(800, 1100), few, pause_s=0.002)
        for index in range(1100):
            got = frames.receive()
            assert (got.seq, got.lost_before) == (index, 0)
    usual_ms = np.percentile(cost["alone"].cpu_ms, 99)
    assert np.percentile(cost["comes"].cpu_ms, 99) < usual_ms + 1
    assert np.percentile(cost["leaves"].cpu_ms, 99) < usual_ms + 1
    assert cost["leaves"].cpu_ms.max() < 100  # once: libzmq removes 5000 prefixes


def test_a_hundred_peers_that_never_read_share_one_queue_of_messages(monkeypatch):
    # They neither answer heartbeats nor acknowledge data, and on a busy machine this takes seconds.
    monkeypatch.setattr(endpoint_module, "DEAD_AFTER_MS", 120_000)
    monkeypatch.setattr(endpoint_module, "STALLED_AFTER_MS", 120_000)
    with (
        Publisher("tcp://127.0.0.1:0", NAMES, high_water_mark=32) as publisher,
        process(READ_NOTHING, publisher.endpoint),
    ):
        assert publisher.wait_for_subscribers(100, TIMEOUT_S, ["cam1"])
        many, before_mb = seen(100), memory_mb()
        cost = publish(publisher, range(500), many)
        assert publisher.subscribers("cam1") == 100
    assert memory_mb() - before_mb < 30  # 100 queues of 32 messages would be 260 MB
    assert np.percentile(cost.cpu_ms, 99) < 2
    assert cost.waits <= 50


def test_a_killed_publisher_that_starts_again_is_reported_and_nothing_counts_as_lost(
    free_port,
):
    endpoint = f"tcp://127.0.0.1:{free_port}"
    with subscribe(endpoint, "cam1", policy="all", timeout_s=TIMEOUT_S) as frames:
        got = []
        for _ in range(3):
            with process(PUBLISH_FOREVER, endpoint):
                known = {frame.publisher for frame in got}
                while sum(frame.publisher not in known for frame in got) < 20:
                    got.append(frames.receive())
        assert len({frame.publisher for frame in got}) == 3
        assert not got[0].restarted
        for before, frame in pairwise(got):
            assert frame.restarted == (frame.publisher != before.publisher)
            assert frame.restarted or frame.seq == before.seq + 1
        assert frames.tally.lost == 0


@pytest.fixture
def rude():
    context = zmq.Context()
    socket = context.socket(zmq.XSUB)
    yield socket
    context.destroy(linger=0)


def test_a_peer_cannot_unsubscribe_another(rude):
    with (
        Publisher("tcp://127.0.0.1:0", NAMES) as publisher,
        subscribe(publisher.endpoint, "cam1", policy="all") as frames,
    ):
        assert publisher.wait_for_subscribers(1, TIMEOUT_S, ["cam1"])
        rude.connect(publisher.endpoint)
        for _ in range(10):
            rude.send(b"\x00v1/cam1/")
        rude.send(b"\x01v1/cam2/")
        # Once this subscription has arrived, so have the messages before it.
        assert publisher.wait_for_subscribers(1, TIMEOUT_S, ["cam2"])
        assert publisher.subscribers("cam1") == 1
        publish(publisher, [0], seen(1))
        assert frames.receive().seq == 0


def test_a_subscription_longer_than_any_topic_disconnects_its_peer(rude):
    with (
        Publisher("tcp://127.0.0.1:0", NAMES) as publisher,
        subscribe(publisher.endpoint, "cam1", policy="all") as frames,
    ):
        assert publisher.wait_for_subscribers(1, TIMEOUT_S, ["cam1"])
        rude.connect(publisher.endpoint)
        rude.send(b"\x01v1/cam2/")
        assert publisher.wait_for_subscribers(1, TIMEOUT_S, ["cam2"])
        rude.send(b"\x01v1/cam2/" + bytes(10_000))
        deadline = time.monotonic() + TIMEOUT_S
        while publisher.subscribers("cam2") and time.monotonic() < deadline:
            publish(publisher, [0], seen(1))
            time.sleep(0.002)
        assert publisher.subscribers("cam2") == 0  # the peer was disconnected
        assert frames.receive().lost_before == 0
