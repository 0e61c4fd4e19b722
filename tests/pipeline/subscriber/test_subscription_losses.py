"""How a subscriber counts gaps, repetitions, restarts and what a slow reader misses."""

import threading
import time

import pytest
from publishers import NAMES, frame, seen
from witnesses import wait_until

from maskcast.pipeline.publisher.publisher import Publisher
from maskcast.pipeline.subscriber.subscribe import subscribe


def test_a_gap_is_reported_exactly(script):
    with subscribe(script.endpoint, policy="all") as frames:
        script.wait()
        for seq in (5, 6, 9, 10, 20):
            script.instances(seq)
        got = [frames.receive() for _ in range(5)]
        assert [f.lost_before for f in got] == [0, 0, 2, 0, 9]
        assert frames.tally.lost == 11
        assert frames.tally.received == 5


def test_messages_lost_at_the_very_end_are_counted_too(script):
    with subscribe(script.endpoint, policy="all") as frames:
        script.wait()
        script.instances(0)
        script.event("ended", sent=4)
        assert len(list(frames)) == 1
        assert frames.tally.lost == 3


def test_messages_that_come_twice_are_yielded_once(script):
    with subscribe([script.endpoint, script.second_endpoint], policy="all") as frames:
        script.wait()
        script.wait()
        for seq in range(5):
            script.instances(seq)
        assert [frames.receive().seq for _ in range(5)] == list(range(5))
        wait_until(lambda: frames.tally.duplicate == 5)
        assert (frames.tally.received, frames.tally.lost) == (5, 0)


def test_a_publisher_that_restarts_is_reported_and_nothing_counts_as_lost(script):
    with subscribe(script.endpoint, policy="all") as frames:
        script.wait()
        script.instances(41)
        script.instances(0, publisher="b" * 16)
        script.instances(1, publisher="b" * 16)
        got = [frames.receive() for _ in range(3)]
        assert [f.restarted for f in got] == [False, True, False]
        assert [f.lost_before for f in got] == [0, 0, 0]


def test_a_subscriber_finds_a_publisher_that_comes_back():
    with Publisher("tcp://127.0.0.1:0", NAMES) as first:
        endpoint = first.endpoint
        frames = subscribe(endpoint, "cam1", policy="all", until_ended=False).open()
        assert first.wait_for_subscribers(1, 60, ["cam1"])
        first.publish(frame(), seen())
        assert frames.receive().restarted is False
        first.event("cam1", "ended")
    with Publisher(endpoint, NAMES) as second:
        assert second.wait_for_subscribers(1, 60, ["cam1"])
        second.publish(frame(), seen())
        again = frames.receive()
    frames.close()
    assert (again.seq, again.restarted, again.lost_before) == (0, True, 0)


def test_latest_yields_the_newest_and_counts_what_it_skipped(script):
    with subscribe(script.endpoint) as frames:
        script.wait()
        script.instances(0)
        assert frames.receive().skipped_before == 0
        for seq in range(1, 51):
            if seq != 30:
                script.instances(seq)
        wait_until(lambda: frames.tally.received == 50)
        newest = frames.receive()
        assert (newest.seq, newest.skipped_before, newest.lost_before) == (50, 48, 1)
        assert (frames.tally.skipped, frames.tally.lost) == (48, 1)
        with pytest.raises(TimeoutError):
            frames.receive(0.05)


def test_latest_keeps_the_newest_of_each_source_in_turn(script):
    with subscribe(script.endpoint) as frames:
        script.wait()
        for seq in range(10):
            for source in ("a", "b", "c"):
                if source != "c" or seq == 0:
                    script.instances(seq, source)
        wait_until(lambda: frames.tally.received == 21)
        got = [frames.receive() for _ in range(3)]
        assert [(f.source, f.seq) for f in got] == [("a", 9), ("b", 9), ("c", 0)]


def test_memory_under_policy_latest_is_bounded_whatever_sources_a_publisher_invents(script):
    with subscribe(script.endpoint, high_water_mark=8) as frames:
        script.wait()
        for number in range(200):
            script.instances(0, source=f"x{number}")
            script.instances(1, source=f"x{number}")
        wait_until(lambda: frames.tally.received >= 8)
        time.sleep(0.2)
        assert frames.tally.received <= 2 * 8 + 1  # more are left in the queue of the socket
        newest = {}
        while len(newest) < 200 or newest["x199"] == 0:
            frame = frames.receive()
            newest[frame.source] = frame.seq
    assert set(newest.values()) == {1}


def test_latest_stays_fresh_however_slow_the_reader():
    with (
        Publisher("tcp://127.0.0.1:0", NAMES, high_water_mark=8) as publisher,
        subscribe(publisher.endpoint, high_water_mark=8) as frames,
    ):
        assert publisher.wait_for_subscribers(1, 60, ["cam1"])
        for index in range(600):
            publisher.publish(frame(index=index), seen(100))
            time.sleep(0.0005)

        def are_queues_empty() -> bool:  # then the last frame cannot be dropped
            received = frames.tally.received
            time.sleep(0.5)
            return frames.tally.received == received

        wait_until(are_queues_empty)
        publisher.publish(frame(index=600), seen())
        wait_until(lambda: frames.tally.received + frames.tally.lost == 601)
        newest = frames.receive()
        assert newest.seq == 600
        assert newest.skipped_before + newest.lost_before == 600


def test_all_yields_what_arrives_and_counts_what_a_slow_reader_loses():
    with (
        Publisher("tcp://127.0.0.1:0", NAMES, high_water_mark=4) as publisher,
        subscribe(publisher.endpoint, policy="all", high_water_mark=4) as frames,
    ):
        assert publisher.wait_for_subscribers(1, 60, ["cam1"])
        got, sent = [], 0
        while sent < 200 or (frames.tally.lost == 0 and sent < 5000):
            for _ in range(100):
                publisher.publish(frame(index=sent), seen(100))
                sent += 1
            got.append(frames.receive())
        reader = threading.Thread(target=lambda: got.extend(frames))
        reader.start()
        while reader.is_alive():
            publisher.event("cam1", "state", state="running")
            publisher.event("cam1", "ended")
            reader.join(0.05)
        tally = frames.tally
    assert tally.lost > 0
    assert tally.skipped == 0
    assert len(got) == tally.received
    assert tally.received + tally.lost == sent
    assert sum(f.lost_before for f in got) <= tally.lost
    assert [f.seq for f in got] == sorted({f.seq for f in got})
