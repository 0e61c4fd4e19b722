"""Poses from the engine to subscribers, recordings and files."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest
from msgspec.structs import replace
from recordings import Background
from witnesses import Listener, configured

from maskcast.engines.errors import InputError
from maskcast.pipeline.cli.profile.report import _busy
from maskcast.pipeline.clients.recording import record
from maskcast.pipeline.frame import POSE, STAGES, STEPS
from maskcast.pipeline.monitor.trace import Trace, trace_events
from maskcast.pipeline.pipeline import Pipeline
from maskcast.pipeline.subscriber.subscribe import subscribe


@pytest.fixture
def posing(timed_engine):
    return timed_engine(pose_s=0.002, max_batch=2)


def test_subscribers_receive_keypoints_with_the_instances_and_tracks(
    make_clip, posing, free_port
) -> None:
    endpoint = f"tcp://127.0.0.1:{free_port}"
    listener = Listener(endpoint)
    publish = {"endpoint": endpoint, "wait_subscribers": 1}
    Pipeline(configured(make_clip(frames=12), publish=publish), posing).run()
    listener.finish()
    assert len(listener.frames) == 12
    for frame in listener.frames:
        assert frame.keypoints == posing.manifest.keypoints
        instances = frame.instances
        corners = instances.boxes.reshape(-1, 2, 2)
        assert np.array_equal(instances.keypoints[..., :2], corners)
        assert (instances.keypoints[..., 2] == 0.75).all()
        assert frame.stage_ms["pose"] >= 2
    assert listener.frames[-1].instances.track_ids.tolist() == [1]
    assert posing.held == 0


def test_without_a_poser_no_pose_is_sent_or_measured(make_clip, timed_engine, free_port) -> None:
    endpoint = f"tcp://127.0.0.1:{free_port}"
    listener = Listener(endpoint)
    publish = {"endpoint": endpoint, "wait_subscribers": 1}
    pipeline = Pipeline(configured(make_clip(), publish=publish), timed_engine())
    pipeline.run()
    listener.finish()
    assert {frame.keypoints for frame in listener.frames} == {None}
    assert all(frame.instances.keypoints is None for frame in listener.frames)
    assert POSE not in pipeline.stats().stages
    assert POSE not in listener.frames[0].stage_ms


def test_the_pose_is_a_step_between_boxes_and_masks_with_figures_of_its_own(
    make_clip, posing
) -> None:
    timelines, trace = [], Trace()
    pipeline = Pipeline(
        configured(make_clip(frames=20)),
        posing,
        on_frame=lambda frame, instances, published: timelines.append(frame.timeline),
        witness=trace,
    )
    pipeline.run()
    for timeline in timelines:
        times = [(timeline.start_ns[step], timeline.end_ns[step]) for step in STEPS]
        assert all(begin <= end for begin, end in times)
        assert all(end <= begin for (_, end), (begin, _) in pairwise(times))
    stages = pipeline.stats().stages
    assert tuple(stages)[:6] == STEPS
    assert stages[POSE].work.count == stages["masks"].work.count == 20
    assert stages[POSE].frame_ms.p50 >= 2
    events = list(trace_events(trace.passages))
    tracks = {
        event["args"]["name"]: event["tid"]
        for event in events
        if event["ph"] == "M" and event["name"] == "thread_name"
    }
    assert POSE not in tracks
    assert {event["tid"] for event in events if event.get("cat") == POSE} == {tracks["masks"]}
    assert {event["name"] for event in events if event["ph"] == "C"} >= {"waiting for pose"}


def test_poses_count_as_work_of_the_masks_stage_when_the_bottleneck_is_named(
    make_clip, posing
) -> None:
    pipeline = Pipeline(configured(make_clip(frames=10)), posing)
    pipeline.run()
    stages = pipeline.stats().stages
    busy = _busy(stages)
    assert tuple(busy) == STAGES
    assert busy["masks"] == stages["masks"].busy + stages[POSE].busy


def test_an_error_in_the_pose_ends_the_run_and_releases_the_features(make_clip, posing) -> None:
    posing.fails_at["estimate_pose"] = 3
    with pytest.raises(ZeroDivisionError):
        Pipeline(configured(make_clip(frames=20)), posing).run()
    assert posing.held == 0


def test_asking_an_engine_without_a_poser_for_poses_is_an_input_error(
    make_clip, timed_engine
) -> None:
    config = configured(make_clip())
    config = replace(config, model=replace(config.model, pose=True))
    with pytest.raises(InputError, match=r"no poser; use load_engine\(..., pose=True\)"):
        Pipeline(config, timed_engine()).run()


def test_a_recording_holds_the_keypoints(make_clip, posing, free_port, tmp_path: Path) -> None:
    endpoint = f"tcp://127.0.0.1:{free_port}"
    path = tmp_path / "run.mcap"
    publish = {"endpoint": endpoint, "wait_subscribers": 1}
    with Background(lambda: record(endpoint, path)):
        Pipeline(configured(make_clip(frames=5), publish=publish), posing).run()
    frames = list(subscribe(f"file:{path}"))
    assert len(frames) == 5
    assert all(frame.instances.keypoints.shape == (1, 2, 3) for frame in frames)
    assert frames[0].keypoints == posing.manifest.keypoints


def test_files_show_skeletons_and_name_keypoints(make_clip, posing, tmp_path: Path) -> None:
    config = configured(make_clip(frames=4, width=160, height=120))
    outputs = {"save": str(tmp_path / "out.mkv"), "jsonl": str(tmp_path / "out.jsonl")}
    Pipeline(replace(config, outputs=replace(config.outputs, **outputs)), posing).run()
    lines = list(map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines()))
    assert [line["instances"][0]["keypoints"] for line in lines] == [
        {"left_top": [1.0, 1.0, 0.75], "right_bottom": [20.0, 20.0, 0.75]}
    ] * 4
    with av.open(str(tmp_path / "out.mkv")) as container:
        image = next(container.decode(video=0)).to_ndarray(format="rgb24")
    assert image[19:21, 19:21].min() > 180  # the joint at the lower right corner of the box
