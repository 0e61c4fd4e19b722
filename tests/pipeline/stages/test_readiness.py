"""What becomes of images that an engine would first have to make itself ready for."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from witnesses import configured, wait_until

from maskcast.pipeline.pipeline import Pipeline

Prepare = Callable[[int, int], bool]


@pytest.fixture
def preparing(timed_engine, monkeypatch: pytest.MonkeyPatch):
    """An engine that is ready for the shapes that a function says."""

    def make(prepare: Prepare):
        engine = timed_engine()
        monkeypatch.setattr(engine, "prepare", prepare)
        return engine

    return make


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
    ready_s = time.monotonic() + 1.5
    config = configured(make_clip(frames=12))
    frames = []
    pipeline = Pipeline(
        config,
        preparing(lambda height, width: time.monotonic() > ready_s),
        on_frame=lambda frame, instances, published: frames.append((frame, published)),
    )
    began_ns = time.time_ns()
    pipeline.run()
    stats = pipeline.stats()
    assert (stats.processed, stats.dropped) == (12, {})
    first, published = frames[0]
    assert published.publish_ns - began_ns > 1_000_000_000  # the engine was waited for
    assert first.capture_ns - began_ns > 1_000_000_000  # and that is not the frame's age
    assert first.timeline.end_ns["decode"] <= first.timeline.start_ns["preprocess"]


def test_a_file_played_like_a_camera_waits_for_the_engine(preparing, make_clip) -> None:
    ready_s = time.monotonic() + 0.5
    engine = preparing(lambda height, width: time.monotonic() > ready_s)
    source = {"url": str(make_clip(frames=5)), "policy": "latest"}
    pipeline = Pipeline(configured(source), engine)
    pipeline.run()
    stats = pipeline.stats()
    assert stats.processed > 0
    assert not any(reason == "engine_not_ready" for _, reason in stats.sources[0].dropped)
