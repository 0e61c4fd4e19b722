"""The record stage: it delays no message, and an output that fails affects no other."""

import errno
import logging
import threading
from collections import Counter

import pytest
from recorded import frame, instances, published
from witnesses import Log, configured, wait_until

from maskcast.pipeline.inbox import Inbox
from maskcast.pipeline.monitor.health import check_health
from maskcast.pipeline.orders import Order, StageEnded
from maskcast.pipeline.pipeline import Pipeline
from maskcast.pipeline.stages.chain import RECORD_CAPACITY
from maskcast.pipeline.stages.record import RETRY_S, Recorded, RecordStage
from maskcast.pipeline.stages.stage import Event, PipelineContext
from maskcast.pipeline.stats import Meter


class Gated(Log):
    """A recorder that waits before each frame until its gate is open."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()
        self.entered = threading.Event()

    def write(self, frame, instances, published) -> None:
        self.entered.set()
        assert self.gate.wait(200)
        super().write(frame, instances, published)


class Failing(Log):
    """A recorder whose disk is full while ``error`` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.error: Exception | None = OSError(errno.ENOSPC, "No space left on device", "out.mp4")
        self.calls: Counter[str] = Counter()

    def write(self, frame, instances, published) -> None:
        self.calls["write"] += 1
        if self.error is not None:
            raise self.error
        super().write(frame, instances, published)

    def end_source(self, source: str) -> None:
        self.calls[f"end {source}"] += 1
        if self.error is not None:
            raise self.error

    def close(self) -> None:
        super().close()
        if self.error is not None:
            raise self.error


def context_of(meter: Meter, orders: list[Order]) -> PipelineContext:
    return PipelineContext(meter, orders.append, threading.Event(), lambda frame: True)


def recorded(index: int) -> Recorded:
    item = Recorded(frame(index), instances(), published(index))
    item.frame.timeline.begin("publish")
    item.frame.timeline.end("publish")
    return item


def test_a_blocked_recorder_delays_no_live_frame_and_what_it_misses_is_counted(
    timed_engine,
) -> None:
    gated = Gated()
    pipeline = Pipeline(configured("test://64x48@100"), timed_engine(), recorders=[gated], limit=60)
    pipeline.start()
    wait_until(lambda: pipeline.stats().processed + pipeline.stats().dropped.total() == 60)
    assert gated.entered.is_set()
    gated.gate.set()
    pipeline.join()
    (source,) = pipeline.stats().sources
    written = len(gated.indices["test"])
    assert written == 1 + RECORD_CAPACITY
    assert source.processed > written
    assert source.unrecorded == {"replaced": source.processed - written}
    assert gated.closed == 1


def test_files_wait_for_a_recorder_and_lose_nothing_while_live_sources_run_on(
    make_clip, timed_engine
) -> None:
    gated = Gated()
    config = configured(make_clip("clip.mp4", frames=60), "test://64x48@100")
    pipeline = Pipeline(config, timed_engine(), recorders=[gated])
    pipeline.start()

    def processed(name: str) -> int:
        return {s.name: s.processed for s in pipeline.stats().sources}[name]

    wait_until(lambda: processed("test") >= 100)
    held = processed("clip")
    assert held < 60
    assert len(gated.indices) == 0
    wait_until(lambda: processed("test") >= 150)
    assert processed("clip") == held
    gated.gate.set()
    wait_until(lambda: processed("clip") == 60)
    pipeline.stop()
    pipeline.join()
    assert gated.indices["clip"] == list(range(60))
    clip, _ = pipeline.stats().sources
    assert clip.unrecorded == {}


def test_a_pipeline_stops_while_a_file_waits_for_a_recorder(make_clip, timed_engine) -> None:
    gated = Gated()
    config = configured(make_clip("clip.mp4", frames=60))
    pipeline = Pipeline(config, timed_engine(), recorders=[gated])
    pipeline.start()
    wait_until(lambda: pipeline.stats().processed >= RECORD_CAPACITY)
    pipeline.stop()
    wait_until(lambda: pipeline.stats().sources[0].ended == "stopped")
    gated.gate.set()
    assert pipeline.wait(60)
    pipeline.join()
    assert len(gated.indices["clip"]) == pipeline.stats().processed


def test_an_output_that_fails_is_paused_and_tried_again_and_the_other_continues(
    caplog: pytest.LogCaptureFixture,
) -> None:
    meter, failing, log, now_s = Meter(["cam"]), Failing(), Log(), [100.0]
    context = context_of(meter, [])
    stage = RecordStage(Inbox(), [failing, log], None, context, clock_s=lambda: now_s[0])
    with caplog.at_level(logging.INFO, "maskcast"):
        for index in range(5):
            stage.work([recorded(index)])
        assert [record.getMessage() for record in caplog.records] == ["recording_failed"]
        assert caplog.records[0].fields == {
            "output": "Failing", "reason": "No space left on device", "file": "out.mp4",
        }  # fmt: skip
        assert failing.calls["write"] == 1
        assert log.indices["cam"] == list(range(5))
        assert meter.stats().outputs == {"Failing": "No space left on device", "Log": ""}
        assert meter.stats().sources[0].unrecorded == {"failed": 5}
        health = check_health(meter.stats(), {"cam"})
        assert health.healthy
        assert health.outputs == {"Failing": "No space left on device", "Log": "recording"}

        now_s[0] += RETRY_S
        stage.work([recorded(5)])  # still full: the same reason is not logged again
        assert failing.calls["write"] == 2
        failing.error = None
        now_s[0] += RETRY_S
        stage.work([recorded(6)])
    messages = [record.getMessage() for record in caplog.records]
    assert messages == ["recording_failed", "recording_resumed"]
    assert failing.indices["cam"] == [6]
    assert meter.stats().outputs == {"Failing": "", "Log": ""}


def test_an_output_that_fails_at_the_end_keeps_no_other_from_being_closed() -> None:
    failing, log, orders = Failing(), Log(), []
    inbox: Inbox[Recorded | Event] = Inbox()
    stage = RecordStage(inbox, [log, failing, Failing()], None, context_of(Meter(["cam"]), orders))
    inbox.post(Event("cam", "ended", {"reason": "removed"}))
    inbox.close()
    stage.run()
    assert orders == [StageEnded()]
    assert failing.calls["end cam"] == 1
    assert (failing.closed, log.closed) == (1, 1)


def test_a_disk_that_is_full_ends_no_run(make_clip, timed_engine) -> None:
    failing, log = Failing(), Log()
    pipeline = Pipeline(configured(make_clip()), timed_engine(), recorders=[failing, log])
    pipeline.run()
    (source,) = pipeline.stats().sources
    assert len(log.indices["clip"]) == source.processed == source.unrecorded["failed"]
    assert (failing.closed, log.closed) == (1, 1)
