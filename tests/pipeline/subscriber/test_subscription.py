import asyncio
import io
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from PIL import Image
from publishers import NAMES, frame, seen
from witnesses import wait_until

from maskcast.engines.errors import InputError
from maskcast.pipeline.publisher.publisher import Publisher
from maskcast.pipeline.subscriber import backlog
from maskcast.pipeline.subscriber.subscribe import subscribe
from maskcast.pipeline.subscriber.subscription import EndOfStreams, PublishedFrame, StreamEvent
from maskcast.pipeline.wire.message import (
    InstancesHeader,
    InstancesMessage,
    WireError,
    encode,
)


@pytest.mark.parametrize("form", ["crop_u8", "crop_bits", "coco_rle", "polygon", "none"])
def test_every_frame_arrives_in_every_format_and_the_loop_ends_with_the_source(form):
    with (
        Publisher("tcp://127.0.0.1:0", NAMES, masks=form) as publisher,
        subscribe(publisher.endpoint, policy="all") as frames,
    ):
        assert publisher.wait_for_subscribers(1, 60, ["cam1"])
        for index in range(20):
            publisher.publish(frame(index=index), seen(), drops={"decode": {"replaced": index}})
        publisher.event("cam1", "ended")
        got = list(frames)
    assert [f.seq for f in got] == list(range(20))
    assert all(isinstance(f, PublishedFrame) for f in got)
    last = got[-1]
    assert (last.source, last.index, last.pts_s) == ("cam1", 19, 19 / 25)
    assert (last.lost_before, last.skipped_before, last.restarted) == (0, 0, False)
    assert last.label_names == NAMES
    assert last.drops == {"decode": {"replaced": 19}}
    assert last.capture_ns <= last.publish_ns <= last.received_ns
    assert 0 <= last.age_ms < 60_000
    assert len(last.instances) == 2
    if form != "none":
        assert last.instances.mask(0).sum() == pytest.approx(36 * 36, rel=0.15)


def test_a_loop_without_with_connects_and_disconnects_by_itself(publisher):
    stop = threading.Event()

    def publish():
        while not stop.wait(0.005):
            publisher.publish(frame(), seen())

    before = threading.active_count()
    thread = threading.Thread(target=publish)
    thread.start()
    for _ in range(2):
        for got in subscribe(publisher.endpoint):
            assert got.source == "cam1"
            break
    stop.set()
    thread.join()
    assert threading.active_count() == before
    publisher.answer_subscriptions()
    wait_until(lambda: publisher.answer_subscriptions() or not publisher.subscribers("cam1"))


def test_a_source_is_not_another_whose_name_begins_with_its_own(publisher):
    with subscribe(publisher.endpoint, "cam1", policy="all") as frames:
        assert publisher.wait_for_subscribers(1, 60, ["cam1"])
        publisher.publish(frame("cam10"), seen())
        publisher.publish(frame("cam1"), seen())
        publisher.event("cam1", "ended")
        assert [f.source for f in frames] == ["cam1"]


def test_several_endpoints_are_one_loop_that_ends_with_the_last_source():
    with (
        Publisher("tcp://127.0.0.1:0", NAMES) as one,
        Publisher("tcp://127.0.0.1:0", NAMES) as two,
        subscribe([one.endpoint, two.endpoint], ["a", "b"], policy="all") as frames,
    ):
        for publisher, source in ((one, "a"), (two, "b")):
            assert publisher.wait_for_subscribers(1, 60, [source])
            publisher.publish(frame(source), seen())
            publisher.event(source, "ended")
        assert {f.source for f in frames} == {"a", "b"}


def test_a_subscriber_after_the_end_receives_no_frame_and_ends(publisher):
    publisher.publish(frame(), seen())
    publisher.event("cam1", "ended")
    with subscribe(publisher.endpoint) as frames:
        assert publisher.wait_for_subscribers(1, 60, ["cam1"])
        assert list(frames) == []


def test_events_are_yielded_on_request(publisher):
    with subscribe(publisher.endpoint, policy="all", events=True) as items:
        assert publisher.wait_for_subscribers(1, 60, ["cam1"])
        publisher.event("cam1", "state", state="running")
        publisher.publish(frame(), seen())
        publisher.event("cam1", "ended", reason="end of stream")
        labels, state, one, ended = items
    assert isinstance(one, PublishedFrame)
    assert [e.name for e in (labels, state, ended)] == ["labels", "state", "ended"]
    assert isinstance(ended, StreamEvent)
    assert ended.data == {"reason": "end of stream"}


def test_silence_is_a_timeout_of_one_line_that_names_the_endpoint(publisher):
    with subscribe(publisher.endpoint, "cam9", timeout_s=0.2) as frames:
        start = time.monotonic()
        with pytest.raises(TimeoutError, match=r"cam9.*127\.0\.0\.1") as caught:
            next(iter(frames))
        assert 0.2 <= time.monotonic() - start < 30
        assert "\n" not in str(caught.value)


def test_a_timeout_gives_the_reason_that_the_source_published(publisher):
    with subscribe(publisher.endpoint, "cam1") as frames:
        publisher.wait_for_subscribers(1, 60, ["cam1"])
        publisher.event("cam1", "state", state="reconnecting")
        wait_until(lambda: frames._backlog.losses.states() == {"cam1": "reconnecting"})
        with pytest.raises(TimeoutError, match="cam1 is reconnecting"):
            frames.receive(0.3)


def test_an_absent_publisher_is_a_timeout_too():
    with pytest.raises(TimeoutError):
        list(subscribe("tcp://127.0.0.1:9", timeout_s=0.1))


@pytest.mark.parametrize("policy", ["latest", "all"])
def test_malformed_messages_are_counted_and_skipped(script, policy):
    with subscribe(script.endpoint, policy=policy) as frames:
        script.wait()
        script.send([b"v1/"])
        script.send([b"v1/cam1/instances", b"nonsense", b"", b""])
        script.send([b"v1/cam1/unknown", b"\x80"])
        header = InstancesHeader(
            publisher="a" * 16,
            seq=0,
            index=0,
            capture_ns=0,
            publish_ns=0,
            width=64,
            height=48,
            count=2,
            masks="crop_u8",
        )
        good = encode(InstancesMessage("cam1", header, seen()))
        script.send([*good[:3], good[3][:-1]])
        with pytest.raises(TimeoutError):
            frames.receive(0.2)
        script.instances(1)
        assert frames.receive().seq == 1
        assert frames.tally.malformed == 4


@pytest.mark.parametrize("policy", ["latest", "all"])
def test_closing_from_another_thread_ends_a_waiting_loop_at_once(policy):
    frames = subscribe("tcp://127.0.0.1:9", policy=policy, timeout_s=60).open()
    timer = threading.Timer(0.1, frames.close)
    timer.start()
    start = time.monotonic()
    assert list(frames) == []
    assert time.monotonic() - start < 30
    timer.join()
    frames.close()
    with pytest.raises(EndOfStreams):
        frames.receive()


def test_closing_is_prompt_while_the_queue_is_full(script):
    frames = subscribe(script.endpoint, policy="all", high_water_mark=2).open()
    script.wait()
    for seq in range(50):
        script.instances(seq)
    wait_until(lambda: frames.tally.received >= 2)
    start = time.monotonic()
    frames.close()
    assert time.monotonic() - start < 30


def test_receiving_without_a_connection_says_how_to_connect():
    with pytest.raises(RuntimeError, match="with subscribe"):
        subscribe("tcp://127.0.0.1:9").receive()


def test_a_subscription_can_be_opened_again(publisher):
    frames = subscribe(publisher.endpoint, "cam1", policy="all")
    for index in range(2):
        with frames:
            assert publisher.wait_for_subscribers(1, 60, ["cam1"])
            publisher.publish(frame(index=index), seen())
            assert frames.receive().lost_before == 0
        wait_until(lambda: publisher.answer_subscriptions() or not publisher.subscribers("cam1"))


def test_an_internal_error_in_the_thread_is_raised(script, monkeypatch):
    def broken(parts):
        raise ZeroDivisionError

    monkeypatch.setattr(backlog, "decode_header", broken)
    with subscribe(script.endpoint) as frames:
        script.wait()
        script.instances(0)
        with pytest.raises(RuntimeError, match="thread failed") as caught:
            frames.receive()
        assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_the_image_that_was_sent_along_is_decoded(script):
    jpeg = io.BytesIO()
    Image.new("RGB", (32, 24), (200, 30, 40)).save(jpeg, "JPEG", quality=95)
    with subscribe(script.endpoint, policy="all") as frames:
        script.wait()
        for seq, part in enumerate((jpeg.getvalue(), None, b"no jpeg", jpeg.getvalue()[:300])):
            script.instances(seq, jpeg=part)
        image = frames.receive().image()
        assert image.shape == (24, 32, 3)
        assert image.dtype == np.uint8
        assert np.abs(image.astype(int) - (200, 30, 40)).max() < 12
        assert frames.receive().image() is None
        for _ in range(2):
            with pytest.raises(WireError, match="image"):
                frames.receive().image()


def test_async_for_yields_the_same_while_the_event_loop_runs_on(publisher):
    async def read():
        ticks = 0

        async def tick():
            nonlocal ticks
            while True:
                ticks += 1
                await asyncio.sleep(0.005)

        ticking = asyncio.create_task(tick())
        async with subscribe(publisher.endpoint, "cam1", policy="all") as frames:
            thread = threading.Thread(target=publish)
            thread.start()
            got = [f.seq async for f in frames]
        thread.join()
        ticking.cancel()
        return got, ticks

    def publish():
        publisher.wait_for_subscribers(1, 60, ["cam1"])
        for index in range(20):
            publisher.publish(frame(index=index), seen())
            time.sleep(0.05)
        publisher.event("cam1", "ended")

    got, ticks = asyncio.run(read())
    assert got == list(range(20))
    assert ticks > 10


def test_async_silence_is_a_timeout():
    async def read():
        async for _ in subscribe("tcp://127.0.0.1:9", timeout_s=0.1):
            pass

    with pytest.raises(TimeoutError, match="nothing from"):
        asyncio.run(read())


def test_a_timeout_says_what_is_known(publisher, tmp_path):
    missing = f"ipc://{tmp_path}/s"
    with (
        pytest.raises(TimeoutError, match=f"for 0.1 s: there is no socket {tmp_path}/s$"),
        subscribe(missing, timeout_s=0.1) as frames,
    ):
        frames.receive()
    with subscribe(publisher.endpoint, timeout_s=0.1) as frames:
        assert publisher.wait_for_subscribers(1, 60, ["cam1"])
        publisher.event("cam1", "state", state="streaming")
        wait_until(lambda: frames._backlog.losses.states() == {"cam1": "streaming"})
        with pytest.raises(TimeoutError, match=r"connected \(cam1 is streaming\) but sends"):
            frames.receive()


def test_an_async_wait_can_be_cancelled_at_once():
    async def read():
        async with subscribe("tcp://127.0.0.1:9", timeout_s=60) as frames:
            task = asyncio.create_task(frames.receive_async())
            await asyncio.sleep(0.05)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    start = time.monotonic()
    asyncio.run(read())
    assert time.monotonic() - start < 30


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"endpoints": "127.0.0.1:5555"}, "invalid endpoint"),
        ({"endpoints": "tcp://127.0.0.1"}, "invalid endpoint"),
        ({"endpoints": "tcp://host:70000"}, "invalid endpoint"),
        ({"endpoints": []}, "endpoints: none given"),
        ({"endpoints": "tcp://127.0.0.1:1", "sources": "a/b"}, "source name"),
        ({"endpoints": "tcp://127.0.0.1:1", "sources": []}, "sources: none given"),
        ({"endpoints": "tcp://127.0.0.1:1", "policy": "newest"}, "policy"),
    ],
    ids=str,
)
def test_wrong_arguments_are_input_errors_of_one_line(arguments, match):
    with pytest.raises(InputError, match=match) as caught:
        subscribe(**arguments)
    assert "\n" not in str(caught.value)


def run_script(code):
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_control_c_ends_a_waiting_loop_at_once():
    process = run_script(
        "from maskcast.pipeline.subscriber.subscribe import subscribe\n"
        "print('waiting', flush=True)\n"
        "for frame in subscribe('tcp://127.0.0.1:9', timeout_s=60): pass\n"
    )
    assert process.stdout.readline() == "waiting\n"
    time.sleep(0.3)
    start = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=50)
    assert time.monotonic() - start < 30
    assert process.returncode == -signal.SIGINT
    assert errors.strip().endswith("KeyboardInterrupt")


def test_a_program_that_does_not_close_its_subscription_still_ends():
    process = run_script(
        "from maskcast.pipeline.subscriber.subscribe import subscribe\n"
        "frames = subscribe('tcp://127.0.0.1:9').open()\n"
        "print('done')\n"
    )
    output, _ = process.communicate(timeout=50)
    assert output == "done\n"
    assert process.returncode == 0
