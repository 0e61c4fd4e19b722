import resource
from itertools import groupby, pairwise
from pathlib import Path

import pytest
from witnesses import Listener, Log, configured, wait_until

from maskcast.pipeline.pipeline import Pipeline
from maskcast.pipeline.subscriber.subscribe import subscribe


def test_no_frame_of_several_files_is_lost_and_all_keep_their_order(
    make_clip, timed_engine
) -> None:
    clips = [make_clip(f"{name}.mp4", frames=40, width=64 + 16 * i) for i, name in enumerate("abc")]
    log, engine = Log(), timed_engine(0.001, 0.001)
    pipeline = Pipeline(configured(*clips), engine, recorders=[log])
    pipeline.run()
    assert log.indices == {name: list(range(40)) for name in "abc"}
    for published in log.published.values():
        assert [sent.seq for sent in published] == list(range(40))
        assert all(sent.dropped_before == 0 for sent in published)
    stats = pipeline.stats()
    assert (stats.captured, stats.processed, stats.dropped) == (120, 120, {})
    assert [source.ended for source in stats.sources] == ["end of stream"] * 3
    assert [source.frame_count for source in stats.sources] == [40] * 3
    assert engine.held == 0


def test_every_frame_passes_the_stages_in_order(make_clip, timed_engine) -> None:
    timelines = []
    Pipeline(
        configured(make_clip()),
        timed_engine(0.002),
        on_frame=lambda frame, instances, published: timelines.append(frame.timeline),
    ).run()
    assert len(timelines) == 10
    for timeline in timelines:
        stages = ("decode", "preprocess", "infer", "masks", "publish")
        stamps = [
            stamp
            for stage in stages
            for stamp in (timeline.start_ns[stage], timeline.end_ns[stage])
        ]
        assert stamps == sorted(stamps)
        assert timeline.end_ns["infer"] - timeline.start_ns["infer"] >= 2_000_000


def test_mask_work_on_one_frame_overlaps_inference_on_the_next(make_clip, timed_engine) -> None:
    timelines = []
    Pipeline(
        configured(make_clip(frames=20)),
        timed_engine(0.02, 0.02),
        on_frame=lambda frame, instances, published: timelines.append(frame.timeline),
    ).run()
    overlaps = [
        after.start_ns["infer"] < before.end_ns["masks"]
        and before.start_ns["masks"] < after.end_ns["infer"]
        for before, after in pairwise(timelines)
    ]
    assert any(overlaps)


def test_a_live_source_with_a_slow_engine_drops_frames_instead_of_queueing_them(
    timed_engine,
) -> None:
    log = Log()
    pipeline = Pipeline(configured("test://64x48@100"), timed_engine(0.05, 0.01), recorders=[log])
    pipeline.start()
    in_work = [0]

    def has_dropped() -> bool:
        (source,) = pipeline.stats().sources
        in_work.append(source.captured - source.processed - sum(source.dropped.values()))
        return source.dropped.get(("preprocess", "replaced"), 0) > 50

    wait_until(has_dropped)
    pipeline.stop()
    pipeline.join()
    assert max(in_work) <= 9  # one in each of four inboxes and five stages
    (source,) = pipeline.stats().sources
    assert source.captured == source.processed + sum(source.dropped.values())
    published, indices = log.published["test"], log.indices["test"]
    for before, after in pairwise(range(len(published))):
        if published[after].seq == published[before].seq + 1:  # none was lost on the way to the log
            gap = indices[after] - indices[before] - 1
            assert published[after].dropped_before == gap
    assert log.indices["test"] == sorted(log.indices["test"])


def test_a_busy_source_does_not_starve_a_slow_one(timed_engine) -> None:
    pipeline = Pipeline(configured("test://64x48@200", "test://64x48@10"), timed_engine(0.02))
    pipeline.start()
    wait_until(lambda: pipeline.stats().sources[1].processed >= 9)
    pipeline.stop()
    pipeline.join()
    busy, _ = pipeline.stats().sources
    assert busy.processed > 0
    assert busy.dropped["preprocess", "replaced"] > 0  # there was always a frame of it waiting


def test_an_engine_that_takes_batches_gets_them_from_several_sources(timed_engine) -> None:
    engine = timed_engine(0.05, max_batch=4)
    pipeline = Pipeline(configured(*["test://64x48@50"] * 4), engine)
    pipeline.start()
    wait_until(lambda: 4 in engine.batches)
    wait_until(lambda: all(source.processed for source in pipeline.stats().sources))
    pipeline.stop()
    pipeline.join()
    assert max(engine.batches) == 4
    assert pipeline.stats().stages["infer"].busy <= 1.01  # a batch is counted once


def test_an_engine_that_takes_batches_never_waits_for_one(timed_engine) -> None:
    engine = timed_engine(max_batch=8)
    pipeline = Pipeline(configured("test://64x48@0.01"), engine)
    pipeline.start()
    wait_until(lambda: pipeline.stats().processed == 1)  # the next frame comes after 100 s
    pipeline.stop()
    pipeline.join()
    assert engine.batches == [1]


def test_frames_of_two_shapes_make_two_batches(timed_engine, monkeypatch) -> None:
    engine = timed_engine(0.02, max_batch=4)
    shapes: list[set[tuple[int, ...]]] = []
    detect = engine.detect
    monkeypatch.setattr(
        engine,
        "detect",
        lambda images, score: (
            shapes.append({image.pixels.shape for image in images}) or detect(images, score)
        ),
    )
    pipeline = Pipeline(configured("test://64x48@50", "test://48x96@50"), engine, limit=20)
    pipeline.run()
    assert all(len(batch) == 1 for batch in shapes)
    assert len(set.union(*shapes)) == 2


def test_a_pipeline_runs_once(make_clip, timed_engine) -> None:
    pipeline = Pipeline(configured(make_clip()), timed_engine())
    pipeline.run()
    with pytest.raises(RuntimeError, match="was started before"):
        pipeline.start()


ABSENT = {
    "RTSP": "rtsp://admin:secret@127.0.0.1:{port}/cam",
    "HTTP": "http://admin:secret@127.0.0.1:{port}/cam",
    "V4L2": "/dev/video99",
}


@pytest.mark.parametrize("required", [True, False])
@pytest.mark.parametrize("kinds", [["RTSP"], ["HTTP"], ["V4L2"], list(ABSENT)])
def test_absent_cameras_are_retried_until_the_pipeline_is_stopped(
    timed_engine, free_port: int, caplog, kinds: list[str], required: bool
) -> None:
    cameras = [
        {"url": ABSENT[kind].format(port=free_port), "name": kind, "required": required}
        for kind in kinds
    ]
    pipeline = Pipeline(configured(*cameras), timed_engine())
    pipeline.start()
    try:
        wait_until(
            lambda: all(source.state == "reconnecting" for source in pipeline.stats().sources)
        )
        assert not pipeline.wait(1.0)
        assert all(source.ended is None for source in pipeline.stats().sources)
    finally:
        pipeline.stop()
        pipeline.join()
    events = [record.fields for record in caplog.records if record.msg == "source_unreachable"]
    # It is logged once while the cause is the same.
    assert [fields["source"] for fields in events].count(kinds[0]) == 1
    assert "secret" not in repr(events) + repr(pipeline.stats())


def test_published_reasons_do_not_say_where_a_source_is(
    timed_engine, free_port: int, tmp_path: Path
) -> None:
    (tmp_path / "text.mp4").write_text("this is no video\n" * 100)
    camera = {"url": ABSENT["RTSP"].format(port=free_port), "name": "camera"}
    file = {"url": str(tmp_path / "text.mp4"), "name": "file"}
    endpoint = f"ipc://{tmp_path}/socket"
    pipeline = Pipeline(configured(camera, file, publish={"endpoint": endpoint}), timed_engine())
    pipeline.start()
    try:
        reasons = {}
        with subscribe(endpoint, events=True, until_ended=False, timeout_s=60) as received:
            while len(reasons) < 2:
                event = received.receive()
                if event.data.get("state") == "reconnecting":
                    reasons["camera"] = event.data["reason"]
                elif event.name == "ended" and event.source == "file":
                    reasons["file"] = event.data["detail"]
        assert reasons["camera"].startswith("connection refused; check")
        assert reasons["file"].startswith("not a video that FFmpeg can read; check")
        assert f"127.0.0.1:{free_port}" in pipeline.stats().sources[0].detail
    finally:
        pipeline.stop()
        pipeline.join()


def test_a_run_over_files_continues_while_a_camera_may_still_come(
    make_clip, timed_engine, rtsp_server
) -> None:
    pipeline = Pipeline(configured(rtsp_server.url, make_clip()), timed_engine())
    pipeline.start()
    wait_until(lambda: pipeline.stats().sources[1].ended == "end of stream")
    assert not pipeline.wait(0.5)
    rtsp_server.start()
    wait_until(lambda: pipeline.stats().sources[0].processed > 5)
    pipeline.stop()
    pipeline.join()


def test_a_source_that_breaks_off_does_not_stop_the_others(timed_engine, stalling_server) -> None:
    silent = {"url": stalling_server.url, "read_timeout_s": 0.5, "name": "silent"}
    pipeline = Pipeline(configured(silent, "test://64x48@20"), timed_engine(), limit=50)
    pipeline.run()
    lost, pattern = pipeline.stats().sources
    assert lost.ended is not None
    assert "no data for 0.5 s" in lost.ended
    assert 0 < lost.processed < 60
    assert pattern.processed + sum(pattern.dropped.values()) == 50


def test_a_camera_that_is_switched_off_and_on_returns_while_another_continues(
    timed_engine, rtsp_server, tmp_path: Path
) -> None:
    endpoint = f"ipc://{tmp_path}/socket"
    listener = Listener(endpoint)
    rtsp_server.start("--credentials", "admin:hunter2")
    camera = {"url": rtsp_server.url.replace("//", "//admin:hunter2@"), "name": "camera"}
    publish = {"endpoint": endpoint, "wait_subscribers": 1}
    pipeline = Pipeline(configured(camera, "test://64x48@20", publish=publish), timed_engine(0.005))
    pipeline.start()
    wait_until(lambda: pipeline.stats().sources[0].processed > 10)
    rtsp_server.stop()
    wait_until(lambda: pipeline.stats().sources[0].state == "reconnecting")
    before = pipeline.stats().sources
    wait_until(lambda: pipeline.stats().sources[1].processed > before[1].processed + 5)
    assert pipeline.stats().sources[0].ended is None
    rtsp_server.start("--credentials", "admin:hunter2", "--width", "160", "--height", "120")
    wait_until(lambda: pipeline.stats().sources[0].processed > before[0].processed + 5)
    pipeline.stop()
    pipeline.join()
    listener.finish()
    off, on = pipeline.stats().sources
    assert (off.state, off.reconnects, on.reconnects) == ("ended", 1, 0)
    assert off.captured == off.processed + sum(off.dropped.values())
    assert on.ended == "stopped"
    events = [event for event in listener.events if event.source == "camera"]
    states = [event.data["state"] for event in events if event.name == "state"]
    assert [state for state, _ in groupby(states)][-3:] == [
        "streaming",
        "reconnecting",
        "streaming",
    ]
    sizes = [event.data for event in events if event.name == "size"]
    assert sizes[-1] == {"width": 160, "height": 120}
    assert listener.ended() == {"camera": "stopped", "test": "stopped"}
    assert "hunter2" not in repr(listener.events) + repr(pipeline.stats()) + repr(pipeline.config)


def test_the_header_names_the_clock_of_the_capture_time(
    timed_engine, rtsp_server, tmp_path: Path
) -> None:
    endpoint = f"ipc://{tmp_path}/socket"
    listener = Listener(endpoint)
    rtsp_server.start()
    camera = {"url": rtsp_server.url, "rtsp_transport": "udp"}
    publish = {"endpoint": endpoint, "wait_subscribers": 1}
    pipeline = Pipeline(configured(camera, publish=publish), timed_engine())
    pipeline.start()
    wait_until(lambda: listener.frames and listener.frames[-1].clock == "sender")
    pipeline.stop()
    pipeline.join()
    listener.finish()
    clocks = [clock for clock, _ in groupby(frame.clock for frame in listener.frames)]
    assert clocks in (["sender"], ["receipt", "sender"])


def test_a_camera_that_comes_late_joins_the_others(timed_engine, rtsp_server) -> None:
    pipeline = Pipeline(configured(rtsp_server.url, "test://64x48@20"), timed_engine())
    pipeline.start()
    wait_until(lambda: pipeline.stats().sources[0].state == "reconnecting")
    assert "connection refused" in pipeline.stats().sources[0].detail
    rtsp_server.start()
    wait_until(lambda: pipeline.stats().sources[0].processed > 5)
    pipeline.stop()
    pipeline.join()


def test_frames_left_out_are_counted_as_skipped(make_clip, timed_engine) -> None:
    log = Log()
    every_third = {"url": str(make_clip("a.mp4", frames=30)), "every_nth": 3}
    five_a_second = {"url": str(make_clip("b.mp4", frames=30, fps=10)), "max_fps": 5}
    pipeline = Pipeline(configured(every_third, five_a_second), timed_engine(), recorders=[log])
    pipeline.run()
    assert log.indices == {"a": list(range(0, 30, 3)), "b": list(range(0, 30, 2))}
    third, fifth = pipeline.stats().sources
    assert (third.skipped, third.dropped) == ({"every_nth": 20}, {})
    assert (fifth.skipped, fifth.dropped) == ({"max_fps": 15}, {})
    assert third.captured == third.processed + 20
    assert all(published.dropped_before == 0 for published in log.published["a"])


def test_a_live_source_is_limited_to_its_rate(timed_engine) -> None:
    times_s = []
    config = configured({"url": "test://64x48@100", "max_fps": 10})
    pipeline = Pipeline(
        config,
        timed_engine(),
        on_frame=lambda frame, instances, published: times_s.append(frame.pts_s),
    )
    pipeline.start()
    wait_until(lambda: pipeline.stats().sources[0].processed >= 10)
    pipeline.stop()
    pipeline.join()
    (source,) = pipeline.stats().sources
    assert all(after - before >= 0.09 for before, after in pairwise(times_s))
    assert source.skipped["max_fps"] > 0
    assert source.captured == source.processed + sum(
        [*source.skipped.values(), *source.dropped.values()]
    )


def test_a_limit_is_for_each_source(make_clip, timed_engine) -> None:
    pipeline = Pipeline(configured(make_clip("a.mp4"), make_clip("b.mp4")), timed_engine(), limit=4)
    pipeline.run()
    assert [source.processed for source in pipeline.stats().sources] == [4, 4]
    assert [source.frame_count for source in pipeline.stats().sources] == [4, 4]


def test_recorders_are_used_and_closed_on_the_record_thread(make_clip, timed_engine) -> None:
    log = Log()
    Pipeline(configured(make_clip()), timed_engine(), recorders=[log]).run()
    assert log.threads == {"record"}
    assert log.closed == 1


def test_a_subscriber_that_is_waited_for_sees_everything(
    make_clip, timed_engine, free_port
) -> None:
    endpoint = f"tcp://127.0.0.1:{free_port}"
    listener = Listener(endpoint)
    publish = {"endpoint": endpoint, "wait_subscribers": 1, "jpeg_quality": 80}
    clips = [make_clip("a.mp4", frames=25), make_clip("b.mp4", frames=25, rotation=90)]
    Pipeline(configured(*clips, publish=publish), timed_engine()).run()
    listener.finish()
    for name in "ab":
        frames = [frame for frame in listener.frames if frame.source == name]
        assert [frame.index for frame in frames] == list(range(25))
        assert all(frame.lost_before == 0 for frame in frames)
        assert all(len(frame.instances) == 1 for frame in frames)
        assert set(frames[0].stage_ms) == {"decode", "preprocess", "infer", "masks"}
    turned = next(frame for frame in listener.frames if frame.source == "b")
    assert turned.image().shape == (64, 48, 3)
    assert listener.ended() == {"a": "end of stream", "b": "end of stream"}


def test_dropped_frames_are_the_same_for_recorders_and_subscribers(timed_engine, tmp_path) -> None:
    endpoint, log = f"ipc://{tmp_path}/socket", Log()
    listener = Listener(endpoint)
    publish = {"endpoint": endpoint, "wait_subscribers": 1}
    fast = {"url": "test://64x48@200", "every_nth": 2, "name": "a"}
    pipeline = Pipeline(configured(fast, publish=publish), timed_engine(0.03), recorders=[log])
    pipeline.start()
    wait_until(lambda: pipeline.stats().processed > 20)
    pipeline.stop()
    pipeline.join()
    listener.finish()
    frames = listener.frames
    assert sum(frame.dropped_before for frame in frames) > 0
    for before, after in pairwise(frames):
        # Every second frame is left out by the configuration, which drops nothing.
        assert after.dropped_before == (after.index - before.index) // 2 - 1
        assert after.lost_before == 0
    recorded = {sent.seq: sent.dropped_before for sent in log.published["a"]}
    assert recorded.items() <= {frame.seq: frame.dropped_before for frame in frames}.items()


def test_a_file_waits_for_the_subscriber(make_clip, timed_engine, free_port) -> None:
    publish = {"endpoint": f"tcp://127.0.0.1:{free_port}", "wait_subscribers": 1}
    pipeline = Pipeline(configured(make_clip(), publish=publish), timed_engine())
    pipeline.start()
    assert not pipeline.wait(0.5)
    assert pipeline.stats().captured == 0
    pipeline.stop()
    assert pipeline.wait(60)
    pipeline.join()


def test_a_change_of_size_is_published(make_clip, timed_engine, free_port, tmp_path: Path) -> None:
    parts = [make_clip("a.h264", frames=5), make_clip("b.h264", frames=5, width=96, height=80)]
    (tmp_path / "both.h264").write_bytes(b"".join(part.read_bytes() for part in parts))
    endpoint = f"tcp://127.0.0.1:{free_port}"
    listener = Listener(endpoint)
    publish = {"endpoint": endpoint, "wait_subscribers": 1}
    Pipeline(configured(tmp_path / "both.h264", publish=publish), timed_engine()).run()
    listener.finish()
    sizes = [event.data for event in listener.events if event.name == "size"]
    assert sizes == [{"width": 64, "height": 48}, {"width": 96, "height": 80}]
    assert {(frame.instances.width, frame.instances.height) for frame in listener.frames} == {
        (64, 48),
        (96, 80),
    }


def test_the_default_model_is_loaded_run_and_freed(make_clip) -> None:
    seen = []
    Pipeline(
        configured(make_clip(frames=3, width=128, height=96)),
        on_frame=lambda frame, instances, published: seen.append(instances),
    ).run()
    assert [(instances.width, instances.height) for instances in seen] == [(128, 96)] * 3


def test_memory_stays_flat(timed_engine) -> None:
    config = configured({"url": "test://320x240@100", "policy": "block"})
    peaks_kib = []

    def note(frame, instances, published) -> None:
        if frame.index in (300, 1499):
            peaks_kib.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)

    Pipeline(config, timed_engine(), on_frame=note, limit=1500).run()
    assert peaks_kib[1] - peaks_kib[0] < 20_000  # one frame in a hundred leaked would be 2700 KiB
