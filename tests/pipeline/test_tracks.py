"""Tracks from the engine to subscribers and outputs."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace
from PIL import Image
from witnesses import Listener, configured

from maskcast.engines.errors import InputError
from maskcast.engines.instances.instances import Instances
from maskcast.pipeline.pipeline import Pipeline

CROPS = np.full((2, 28, 28), 255, np.uint8)


@pytest.fixture
def crossing(timed_engine):
    """Return an engine that finds two objects in frames of 64x48; they cross and change order."""

    class Crossing(timed_engine):
        def segment(self, detections):
            found = []
            for _ in super().segment(detections):
                self.frames = getattr(self, "frames", -1) + 1
                x, other = 2 + 2 * self.frames, 50 - 2 * self.frames
                boxes = np.float32([[x, 4, x + 8, 22], [other, 14, other + 8, 34]])
                order = [0, 1] if self.frames % 2 else [1, 0]
                scores, labels = np.float32([0.9, 0.9]), np.int32([1, 1])
                found.append(Instances(64, 48, boxes, scores, labels, CROPS)[np.array(order)])
            return found

    return Crossing()


def track_ids(pipeline_engine, *sources):
    """Run a pipeline; return the track ids of its frames, sorted by the boxes' tops."""
    found, lock = [], threading.Lock()

    def keep(frame, instances, published):
        with lock:
            order = np.argsort(instances.boxes[:, 1])
            ids = instances.track_ids
            found.append(None if ids is None else ids[order].tolist())

    Pipeline(configured(*sources), pipeline_engine, on_frame=keep).run()
    return found


def test_objects_that_cross_keep_their_ids_by_default(make_clip, crossing) -> None:
    found = track_ids(crossing, make_clip(frames=24))
    assert len(found) == 24
    assert found[:2] == [[0, 0]] * 2  # an object gets its id when it has been seen three times
    assert sorted(found[2]) == [1, 2]
    assert found[2:] == [found[2]] * 22


def test_tracking_can_be_turned_off(make_clip, crossing) -> None:
    url = str(make_clip(frames=4))
    assert track_ids(crossing, {"url": url, "track": False}) == [None] * 4


def test_images_are_tracked_only_on_request(crossing, tmp_path: Path) -> None:
    for number in range(3):
        Image.new("RGB", (64, 48)).save(tmp_path / f"{number}.png")
    assert track_ids(crossing, str(tmp_path)) == [None] * 3
    found = track_ids(crossing, {"url": str(tmp_path), "track": True})
    assert all(ids is not None for ids in found)


def test_each_source_has_its_own_tracks(make_clip, timed_engine) -> None:
    engine = timed_engine(max_batch=4)
    clips = [make_clip(f"{name}.mp4", frames=9) for name in "abc"]
    assert sorted(track_ids(engine, *clips)) == [[0]] * 6 + [[1]] * 21


def test_subscribers_receive_ids_and_the_end_of_tracks(make_clip, crossing, free_port) -> None:
    endpoint = f"tcp://127.0.0.1:{free_port}"
    listener = Listener(endpoint)
    publish = {"endpoint": endpoint, "wait_subscribers": 1}
    Pipeline(configured(make_clip("cam.mp4", frames=20), publish=publish), crossing).run()
    listener.finish()
    assert all(sorted(frame.instances.track_ids) == [1, 2] for frame in listener.frames[2:])
    names = [event.name for event in listener.events]
    assert names[-3:] == ["track_ended", "track_ended", "ended"]
    ends = sorted(listener.events[-3:-1], key=lambda event: event.data["track_id"])
    for event, number in zip(ends, (1, 2), strict=True):
        last = listener.frames[-1]
        assert event.data == {
            "track_id": number,
            "label": "thing",
            "index": 19,
            "capture_ns": last.capture_ns,
            "duration_s": pytest.approx(1.9, abs=0.01),
            "reason": "ended",
        }


def test_a_source_that_is_removed_ends_its_tracks(timed_engine, free_port, tmp_path) -> None:
    endpoint = f"tcp://127.0.0.1:{free_port}"
    listener = Listener(endpoint)
    config = configured(
        {"url": "test://64x48@50", "name": "cam"},
        publish={"endpoint": endpoint, "wait_subscribers": 1},
    )
    pipeline = Pipeline(replace(config, control=f"ipc://{tmp_path}/control"), timed_engine())
    pipeline.start()
    while pipeline.stats().processed < 10:
        pipeline.wait(0.02)
    pipeline.remove("cam")
    while pipeline.sources():
        pipeline.wait(0.02)
    pipeline.stop()
    pipeline.join()
    listener.finish()
    names = [event.name for event in listener.events if event.name in ("track_ended", "ended")]
    assert names[:2] == ["track_ended", "ended"]


def test_zones_and_lines_reach_subscribers_and_figures(make_clip, crossing, free_port) -> None:
    endpoint = f"tcp://127.0.0.1:{free_port}"
    listener = Listener(endpoint)
    publish = {"endpoint": endpoint, "wait_subscribers": 1}
    source = {
        "url": str(make_clip("cam.mp4", frames=24)),
        "zones": [{"name": "door", "polygon": [[0, 0], [0.5, 0], [0.5, 1], [0, 1]]}],
        "lines": [{"name": "gate", "points": [[0.5, 0], [0.5, 1]]}],
    }
    pipeline = Pipeline(configured(source, publish=publish), crossing)
    pipeline.run()
    listener.finish()
    assert [frame.zones["door"] for frame in listener.frames][3:] == pytest.approx([1] * 21, abs=1)
    assert listener.frames[0].lines == {"gate": {"forward": 0, "backward": 0}}
    assert listener.frames[-1].lines == {"gate": {"forward": 1, "backward": 1}}
    happened = [
        (event.name, event.data["track_id"])
        for event in listener.events
        if "track_id" in event.data
    ]
    right, left = sorted(
        {1, 2}, key=lambda number: happened.index(("zone_entered", number)), reverse=True
    )
    for number in (left, right):
        names = [name for name, of in happened if of == number]
        assert sorted(names) == ["line_crossed", "track_ended", "zone_entered", "zone_left"]
    crossed = [event for event in listener.events if event.name == "line_crossed"]
    assert {event.data["direction"] for event in crossed} == {"forward", "backward"}
    for event in crossed:
        frame = next(f for f in listener.frames if f.index == event.data["index"])
        assert event.data["capture_ns"] == frame.capture_ns
        assert event.data["label"] == "thing"
    (figures,) = pipeline.stats().sources
    assert figures.lines == {"gate": {"forward": 1, "backward": 1}}


def test_a_zone_for_a_class_that_the_model_lacks_is_an_input_error(make_clip, timed_engine) -> None:
    zone = {"name": "door", "polygon": [[0, 0], [1, 0], [1, 1]], "labels": ["thin"]}
    config = configured({"url": str(make_clip()), "zones": [zone]})
    with pytest.raises(InputError, match="no class 'thin'; did you mean 'thing'"):
        Pipeline(config, timed_engine()).run()
