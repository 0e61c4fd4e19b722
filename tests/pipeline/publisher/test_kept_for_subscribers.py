"""Kept events for new subscribers: more of them than a queue holds, over real sockets."""

import contextlib

import pytest
import zmq
from witnesses import wait_until

from maskcast.pipeline.publisher import subscribers
from maskcast.pipeline.publisher.subscribers import OpenSubscribers

KEPT = [[b"v1/x%d/event" % number, b"{}"] for number in range(500)]
QUEUE = 5


@pytest.fixture
def sockets():
    """Return a publishing socket, and a function that connects to it with a small queue."""
    with zmq.Context() as context, context.socket(zmq.XPUB) as publishing:
        publishing.set(zmq.XPUB_VERBOSER, 1)
        publishing.set(zmq.SNDHWM, QUEUE)
        publishing.bind("inproc://kept")
        with contextlib.ExitStack() as stack:

            def connect():
                socket = stack.enter_context(context.socket(zmq.SUB))
                socket.set(zmq.RCVHWM, QUEUE)
                socket.subscribe(b"v1/")
                socket.connect("inproc://kept")
                return socket

            yield publishing, connect


def take(socket, most):
    """Receive what has arrived, ``most`` messages at most."""
    taken = []
    while len(taken) < most and socket.poll(0):
        taken.append(socket.recv_multipart())
    return taken


@pytest.mark.parametrize("is_lossless", [False, True])
def test_a_subscriber_that_reads_slowly_receives_all_kept_events(
    sockets, monkeypatch, is_lossless
) -> None:
    monkeypatch.setattr(subscribers, "STALLED_S", 1000.0)
    publishing, connect = sockets
    slow, answering = connect(), OpenSubscribers(is_lossless)
    received = []

    def step():
        answering.answer(publishing, 0.01, lambda _: KEPT)
        received.extend(take(slow, 2))
        return len(received) == len(KEPT)

    wait_until(step)
    assert received == KEPT
    assert not answering.has_backlog


def test_a_subscriber_that_reads_nothing_does_not_keep_the_events_from_another(sockets) -> None:
    publishing, connect = sockets
    connect()
    answering = OpenSubscribers()
    wait_until(lambda: answering.answer(publishing, 0.01, lambda _: []))
    for parts in KEPT[: 4 * QUEUE]:
        publishing.send_multipart(parts)  # its queue is full now
    late, received = connect(), []
    few = KEPT[: QUEUE - 1]

    def step():
        answering.answer(publishing, 0.01, lambda _: few)
        received.extend(take(late, 10))
        return len(received) == len(few)

    wait_until(step)
    assert received == few
    # Frames for a full queue are dropped as before, without a wait.
    for parts in KEPT[: 4 * QUEUE]:
        publishing.send_multipart(parts, zmq.DONTWAIT)
    assert take(late, 100)
