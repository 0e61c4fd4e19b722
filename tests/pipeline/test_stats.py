import time

import av
import numpy as np
import pytest

from maskcast.engines.instances.instances import Instances
from maskcast.pipeline.frame import STAGES, Frame, Timeline
from maskcast.pipeline.sources.state import SourceState, StateChange
from maskcast.pipeline.stats import Meter

MS = 1_000_000


def make_frame(source: str, index: int, at_ms: int, work_ms: int = 10) -> Frame:
    """Return a frame that each stage worked on for ``work_ms``, after a wait of 1 ms."""
    timeline = Timeline()
    for place, stage in enumerate(STAGES):
        timeline.start_ns[stage] = (at_ms + place * (work_ms + 1)) * MS
        timeline.end_ns[stage] = timeline.start_ns[stage] + work_ms * MS
    return Frame(source, index, None, 0, av.VideoFrame(16, 16, "gray"), timeline=timeline)


def nothing_seen() -> Instances:
    empty = np.empty((0, 4), np.float32)
    return Instances(16, 16, empty, np.empty(0, np.float32), np.empty(0, np.int32))


def test_latency_is_from_the_start_of_decoding_to_the_end_of_publishing() -> None:
    meter = Meter(["a"])
    for index in range(100):
        frame = make_frame("a", index, at_ms=1000 + 20 * index, work_ms=10)
        meter.captured(frame, 0)
        meter.processed(frame, nothing_seen())
    stats = meter.stats()
    assert stats.latency_ms == pytest.approx((54, 54, 54))
    assert stats.wall_s == pytest.approx(99 * 0.020 + 0.054)
    assert stats.fps == pytest.approx(100 / stats.wall_s)
    assert stats.stages["infer"].frame_ms == pytest.approx((10, 10, 10))
    assert stats.stages["infer"].busy == pytest.approx(1.0 / stats.wall_s)
    assert tuple(stats.stages) == STAGES


def test_percentiles_show_the_few_slow_frames() -> None:
    meter = Meter(["a"])
    for index in range(100):
        frame = make_frame("a", index, at_ms=1000 * index, work_ms=100 if index >= 97 else 10)
        meter.captured(frame, 0)
        meter.processed(frame, nothing_seen())
    p50, p95, p99 = meter.stats().stages["masks"].frame_ms
    assert (p50, p95, p99) == pytest.approx((10, 10, 100))


def test_a_batch_works_once_for_all_its_frames() -> None:
    meter = Meter(["a", "b"])
    frames = [make_frame("a", 0, at_ms=0), make_frame("b", 0, at_ms=0)]
    for frame in frames:
        meter.captured(frame, 0)
        meter.processed(frame, nothing_seen())
    stats = meter.stats()
    assert stats.stages["infer"].busy == pytest.approx(0.010 / 0.054)


def test_drops_are_counted_by_stage_and_reason() -> None:
    meter = Meter(["a", "b"])
    for index in range(5):
        frame = make_frame("a", index, at_ms=index)
        meter.captured(frame, corrupt=index)
        if index:
            meter.dropped(frame, "preprocess", "replaced" if index < 4 else "stopped")
    stats = meter.stats()
    assert stats.sources[0].dropped == {("preprocess", "replaced"): 3, ("preprocess", "stopped"): 1}
    assert stats.dropped.total() == 4
    assert meter.drops("a") == {"preprocess": {"replaced": 3, "stopped": 1}}
    assert meter.drops("b") == {}
    assert stats.sources[0].corrupt == 4
    assert stats.captured == 5


def test_a_rate_is_of_the_last_seconds_while_the_source_runs_and_of_its_life_afterwards() -> None:
    meter = Meter(["a"])
    now_ms = time.monotonic_ns() // MS
    for index in range(100):  # 10 per second, until now
        frame = make_frame("a", index, at_ms=now_ms - 100 * (100 - index))
        meter.captured(frame, 0)
        meter.processed(frame, nothing_seen())
    assert meter.stats().sources[0].fps == pytest.approx(10, rel=0.3)  # "now" passes
    meter.ended("a", "end of stream", 0)
    assert meter.stats().sources[0].fps == pytest.approx(10, rel=0.001)
    assert meter.stats().sources[0].ended == "end of stream"


def test_a_source_has_not_ended_while_its_frames_are_in_work() -> None:
    meter = Meter(["a"])
    frames = [make_frame("a", index, at_ms=100 * index, work_ms=10) for index in range(3)]
    for frame in frames:
        meter.captured(frame, 0)
    meter.changed("a", StateChange(SourceState.STREAMING))
    meter.ended("a", "end of stream", 0)
    meter.processed(frames[0], nothing_seen())
    meter.dropped(frames[1], "preprocess", "unreadable")
    (source,) = meter.stats().sources
    assert (source.ended, source.state) == (None, "streaming")
    meter.processed(frames[2], nothing_seen())
    (source,) = meter.stats().sources
    assert (source.ended, source.state) == ("end of stream", "ended")
    meter.captured(make_frame("a", 3, at_ms=300, work_ms=10), 0)
    meter.ended("a", "lost", 0)
    assert meter.stats().sources[0].ended == "lost"  # at once: it is a fault


def test_figures_before_the_first_frame_are_zero() -> None:
    stats = Meter(["a"]).stats()
    assert (stats.captured, stats.processed, stats.fps, stats.wall_s) == (0, 0, 0, 0)
    assert stats.latency_ms is None
    assert stats.sources[0].latency_ms is None
    assert not stats.stages


def test_the_state_of_a_source_is_known_until_its_end() -> None:
    meter = Meter(["a"])
    assert meter.stats().sources[0].state is SourceState.CONNECTING
    meter.changed("a", StateChange(SourceState.RECONNECTING, "connection refused", 3))
    (source,) = meter.stats().sources
    assert (source.state, source.detail, source.reconnects) == (
        "reconnecting",
        "connection refused",
        3,
    )
    meter.ended("a", "stopped", corrupt=0)
    (source,) = meter.stats().sources
    assert (source.state, source.detail, source.reconnects) == ("ended", "stopped", 3)


def test_waiting_before_a_stage_is_measured_apart_from_its_work() -> None:
    meter = Meter(["a"])
    for index in range(10):
        frame = make_frame("a", index, at_ms=100 * index, work_ms=10)
        meter.captured(frame, 0)
        meter.processed(frame, nothing_seen())
    stages = meter.stats().stages
    assert stages["decode"].wait is None
    for stage in STAGES[1:]:
        wait = stages[stage].wait
        assert wait is not None
        assert wait.percentiles_ms == pytest.approx((1, 1, 1))
    # Work and waits together are the whole latency.
    parts = [
        stage.work.mean_ms + (stage.wait.mean_ms if stage.wait else 0) for stage in stages.values()
    ]
    assert sum(parts) == pytest.approx(54)


def test_a_stage_is_busy_with_dropped_frames_too() -> None:
    meter = Meter(["a"])
    for index in range(4):
        frame = make_frame("a", index, at_ms=100 * index)
        meter.captured(frame, 0)
        if index % 2:
            meter.dropped(frame, "preprocess", "replaced")
        else:
            meter.processed(frame, nothing_seen())
    assert meter.stats().stages["decode"].busy_s == pytest.approx(0.040)
    assert meter.stats().stages["decode"].work.count == 2


def test_sources_are_added_and_removed_while_their_frames_are_in_work() -> None:
    meter = Meter(["a"])
    meter.add("b")
    frames = {name: make_frame(name, 0, at_ms=0) for name in "ab"}
    for frame in frames.values():
        meter.captured(frame, 0)
    meter.remove("b")
    meter.processed(frames["b"], nothing_seen())
    meter.dropped(frames["b"], "preprocess", "stopped")
    meter.ended("b", "removed", 0)
    meter.changed("b", StateChange(SourceState.STREAMING))
    assert meter.drops("b") == {}
    assert [source.name for source in meter.stats().sources] == ["a"]
    assert meter.stats().stages["infer"].work.count == 1
    meter.add("b")
    assert (meter.stats().sources[1].name, meter.stats().sources[1].captured) == ("b", 0)
