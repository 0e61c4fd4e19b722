"""Frames of shapes that the engine is not ready for."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from witnesses import configured, wait_until

from maskcast.pipeline.pipeline import Pipeline

Prepare = Callable[[int, int], bool]


@pytest.fixture
def preparing(timed_engine, monkeypatch: pytest.MonkeyPatch):
    """Return a function that makes an engine with another ``prepare``."""

    def make(prepare: Prepare):
        engine = timed_engine()
        monkeypatch.setattr(engine, "prepare", prepare)
        return engine

    return make


class ReadyAfter:
    """A ``prepare`` that is done some time after its first call."""

    def __init__(self, wait_s: float) -> None:
        self.asked_ns = 0
        self._wait_ns = wait_s * 1e9

    def __call__(self, height: int, width: int) -> bool:
        self.asked_ns = self.asked_ns or time.time_ns()
        return time.time_ns() - self.asked_ns > self._wait_ns


def test_a_camera_counts_from_when_the_engine_is_ready(preparing) -> None:
    ready = False
    asked = set()

    def prepare(height: int, width: int) -> bool:
        asked.add((height, width))
        return ready

    pipeline = Pipeline(configured("test://64x48@100"), preparing(prepare))
    pipeline.start()
    time.sleep(0.5)
    stats = pipeline.stats()
    assert (stats.captured, stats.dropped) == (0, {})
    ready = True
    wait_until(lambda: pipeline.stats().processed > 0)
    pipeline.stop()
    pipeline.join()
    assert asked == {(96, 96)}  # the network's input, not the image


def test_a_camera_of_a_new_shape_loses_frames_and_others_lose_none(
    preparing, make_clip, tmp_path: Path
) -> None:
    parts = [make_clip("a.h264", frames=5), make_clip("b.h264", frames=7, width=48, height=160)]
    changing = tmp_path / "changing.h264"
    changing.write_bytes(b"".join(part.read_bytes() for part in parts))
    sources = [
        {"url": str(changing), "name": "camera", "policy": "latest"},
        {"url": str(make_clip("file.mp4", frames=30)), "name": "file"},
    ]
    # An upright image makes an upright input.
    pipeline = Pipeline(configured(*sources), preparing(lambda h, w: h <= w))
    pipeline.run()
    camera, file = pipeline.stats().sources
    assert camera.dropped["decode", "engine_not_ready"] == 7
    assert camera.captured == 12
    assert (file.processed, file.dropped) == (30, {})


def test_a_file_waits_for_the_engine_loses_nothing_and_is_not_late(preparing, make_clip) -> None:
    ready = ReadyAfter(1.0)
    frames = []
    pipeline = Pipeline(
        configured(make_clip(frames=12)),
        preparing(ready),
        on_frame=lambda frame, instances, published: frames.append((frame, published)),
    )
    pipeline.run()
    stats = pipeline.stats()
    assert (stats.processed, stats.dropped) == (12, {})
    first, published = frames[0]
    assert published.publish_ns - ready.asked_ns > 1_000_000_000  # it waited for the engine
    assert first.capture_ns - ready.asked_ns > 1_000_000_000  # that is no part of a frame's age
    assert first.timeline.end_ns["decode"] <= first.timeline.start_ns["preprocess"]


def test_a_file_played_like_a_camera_waits_for_the_engine(preparing, make_clip) -> None:
    source = {"url": str(make_clip(frames=5)), "policy": "latest"}
    pipeline = Pipeline(configured(source), preparing(ReadyAfter(0.5)))
    pipeline.run()
    stats = pipeline.stats()
    assert stats.processed > 0
    assert not any(reason == "engine_not_ready" for _, reason in stats.sources[0].dropped)
