import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import msgspec
import pytest
from witnesses import wait_until

from maskcast.engines.errors import InputError
from maskcast.engines.memory import read_memory
from maskcast.pipeline.cli.profile import profile as module
from maskcast.pipeline.cli.profile.profile import ProfileInterrupted, profile, show_profile
from maskcast.pipeline.cli.profile.report import name_bottleneck
from maskcast.pipeline.configuration.config import SourceConfig
from maskcast.pipeline.monitor.trace import Trace
from maskcast.pipeline.publisher.publisher import Publisher


def test_the_default_model_is_profiled_on_a_file(make_clip) -> None:
    before = read_memory()  # other tests of this process may have held more
    report = profile(str(make_clip(frames=5, width=128, height=96)), limit=4)
    fields = msgspec.json.decode(msgspec.json.encode(report))
    assert set(fields) == {
        "frames", "wall_s", "fps", "engine_fps", "captured", "processed", "dropped",
        "rates", "drops", "latency_ms", "stages", "processor_ms", "overhead",
        "rss_bytes", "peak_bytes", "decoding", "bottleneck",
    }  # fmt: skip
    assert set(fields["latency_ms"]) == {"p50", "p95", "p99"}
    assert list(fields["stages"]) == ["decode", "preprocess", "infer", "masks", "publish"]
    for stage in fields["stages"].values():
        assert set(stage) == {"p50_ms", "p95_ms", "p99_ms", "mean_ms", "busy", "wait", "share"}
        assert 0 < stage["p50_ms"] <= stage["p95_ms"] <= stage["p99_ms"]
        assert 0 < stage["busy"] <= 1.01
    assert sum(stage["share"] for stage in fields["stages"].values()) == pytest.approx(1)
    assert fields["stages"]["decode"]["wait"] is None
    assert 50e6 < report.rss_bytes <= report.peak_bytes < before.peak_bytes + 5e9
    assert (report.frames, report.captured, report.processed, report.dropped) == (4, 4, 4, 0)
    assert report.fps == pytest.approx(report.frames / report.wall_s)


def test_an_engine_is_timed_alone_and_in_the_run_and_left_open(make_clip, timed_engine) -> None:
    engine = timed_engine(0.015, 0.001)
    report = profile(str(make_clip(frames=60)), engine)
    assert report.engine_fps < 1.01 / 0.016
    assert report.stages["infer"].p50_ms >= 15
    busy = {name: stage.busy for name, stage in report.stages.items()}
    assert report.bottleneck == name_bottleneck(
        busy, captured_fps=report.rates.captured, paced=False
    )
    assert not engine.closed


def test_the_overhead_compares_processor_time_with_that_of_the_parts(
    make_clip, timed_engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spin(seconds: float) -> None:
        until_s = time.thread_time() + seconds
        while time.thread_time() < until_s:
            pass

    engine = timed_engine()
    detect, segment = engine.detect, engine.segment
    monkeypatch.setattr(engine, "detect", lambda *given: (spin(0.02), detect(*given))[1])
    monkeypatch.setattr(engine, "segment", lambda *given: (spin(0.001), segment(*given))[1])
    report = profile(str(make_clip(frames=20)), engine)
    spent = report.processor_ms
    assert spent is not None
    assert 21 <= spent.engine < 30
    assert spent.run > 21
    assert report.overhead == pytest.approx(spent.run / spent.alone - 1)


def test_poses_have_a_row_and_are_part_of_the_engines_time(make_clip, timed_engine) -> None:
    report = profile(str(make_clip(frames=20)), timed_engine(pose_s=0.01))
    assert report.stages["pose"].p50_ms >= 10
    assert report.engine_fps <= 100


def test_a_live_source_has_no_overhead_to_report(timed_engine) -> None:
    report = profile("test://64x48@100", timed_engine(0.002), limit=10)
    assert report.processor_ms is None
    assert report.overhead is None


def test_a_long_file_is_timed_on_frames_from_all_of_it(make_clip, timed_engine) -> None:
    engine, progress = timed_engine(0.002), []
    report = profile(
        str(make_clip(frames=400)),
        engine,
        on_progress=lambda done, total: progress.append((done, total)),
    )
    assert report.processed == 400
    assert progress == sorted(progress)
    assert progress[-1] == (400 + 2 * 100, 400 + 2 * 100)
    shapes = 1
    before_and_after = 2 * (100 + shapes)
    assert len(engine.batches) == 400 + before_and_after


def test_frames_that_a_live_source_loses_are_in_the_report(timed_engine) -> None:
    source = SourceConfig(url="test://64x48@100")
    report = profile(source, timed_engine(0.02), limit=30)
    assert report.captured == 30
    assert report.dropped > 0
    assert report.captured == report.processed + report.dropped
    assert report.drops == {"preprocess": {"replaced": report.dropped}}
    rates = report.rates
    assert rates.captured == pytest.approx(rates.processed + rates.dropped)


def test_a_source_that_is_slower_than_every_stage_is_the_bottleneck(timed_engine) -> None:
    report = profile("test://64x48@10", timed_engine(0.005), limit=20)
    assert report.bottleneck.startswith("the source: it delivers ")


def test_a_trace_keeps_what_the_report_counts(timed_engine) -> None:
    trace = Trace()
    report = profile("test://64x48@100", timed_engine(0.02), limit=30, trace=trace)
    dropped = [passage for passage in trace.passages if passage.drop is not None]
    seqs = [passage.seq for passage in trace.passages if passage.drop is None]
    assert len(dropped) == report.dropped > 0
    assert seqs == list(range(report.processed))
    indices = {passage.index for passage in trace.passages}
    assert len(indices) == 30
    assert max(indices) - min(indices) == 29  # frames before the subscriber came do not count


def test_a_source_that_is_not_there_is_named(timed_engine, tmp_path) -> None:
    with pytest.raises(InputError, match=r"gone\.mp4"):
        profile(str(tmp_path / "gone.mp4"), timed_engine())


def test_a_live_source_is_opened_twice(timed_engine, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []
    create = module.create_source

    def count(config: SourceConfig, *rest):  # type: ignore[no-untyped-def]
        opened.append(config)
        return create(config, *rest)

    monkeypatch.setattr(module, "create_source", count)
    engine = timed_engine(0.002)
    report = profile("test://64x48@100", engine, limit=30)
    assert len(opened) == 1  # the pipeline opens it once more
    assert report.captured == 30
    assert report.engine_fps > 0


def test_a_profile_that_is_stopped_reports_the_frames_so_far(timed_engine) -> None:
    stop, engine = threading.Event(), timed_engine(0.002)
    report = profile(
        "test://64x48@50",
        engine,
        limit=10_000,
        on_progress=lambda done, total: stop.set() if done > 128 + 20 else None,
        stop=stop,
    )
    assert 10 < report.processed < 1000
    stop = threading.Event()
    stop.set()
    with pytest.raises(ProfileInterrupted):
        profile("test://64x48@50", engine, stop=stop)


@pytest.fixture
def engine_for_profiles(timed_engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "load_engine", lambda *_, **__: timed_engine(0.002))


@pytest.mark.usefixtures("engine_for_profiles")
def test_ctrl_c_prints_the_report_and_writes_the_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = module.run_pipeline

    def interrupt(*arguments):  # type: ignore[no-untyped-def]
        *others, progress = arguments

        def interrupt_once(processed: int) -> None:
            progress(processed)
            if processed > 5:
                os.kill(os.getpid(), signal.SIGINT)

        return run(*others, interrupt_once)

    monkeypatch.setattr(module, "run_pipeline", interrupt)
    report, trace = tmp_path / "report.json", tmp_path / "trace.json"
    show_profile("test://64x48@50", None, 10_000, "auto", False, report, trace)
    shown = capsys.readouterr().err
    assert "interrupted: these are the figures of the first" in shown
    frames = json.loads(report.read_bytes())["frames"]
    assert 0 < frames < 1000
    assert json.loads(trace.read_bytes())["traceEvents"]
    assert signal.getsignal(signal.SIGINT) is not signal.SIG_IGN


def test_a_profile_logs_that_it_waits_for_an_absent_camera(
    timed_engine, free_port: int, caplog: pytest.LogCaptureFixture
) -> None:
    stop = threading.Event()
    caplog.handler.addFilter(lambda record: stop.set() or True)
    with pytest.raises(ProfileInterrupted):
        profile(f"rtsp://127.0.0.1:{free_port}/cam", timed_engine(), stop=stop)
    (record,) = caplog.records
    assert record.message == "source_unreachable"
    assert "connection refused" in str(vars(record))


@pytest.mark.usefixtures("engine_for_profiles")
def test_a_profile_touches_no_file_before_it_has_something_to_write(
    make_clip, tmp_path: Path
) -> None:
    clip, old = make_clip(), tmp_path / "old.json"
    before = clip.read_bytes()
    old.write_text("old")
    with pytest.raises(InputError, match="it is the input"):
        show_profile(str(clip), None, None, "auto", False, clip, None)
    with pytest.raises(InputError, match="two outputs have this name"):
        show_profile(str(clip), None, None, "auto", False, old, old)
    with pytest.raises(InputError, match="cannot be written: no such folder"):
        show_profile(str(clip), None, None, "auto", False, tmp_path / "absent" / "r.json", None)
    with pytest.raises(InputError, match=r"gone\.mp4"):
        show_profile(
            str(tmp_path / "gone.mp4"), None, None, "auto", False, old, tmp_path / "new.json"
        )
    assert clip.read_bytes() == before
    assert old.read_text() == "old"
    assert not (tmp_path / "new.json").exists()
    show_profile(str(clip), None, None, "auto", False, old, None)
    assert json.loads(old.read_bytes())["frames"] == 10


def test_a_pipe_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="a pipe can be read only once; profile a file"):
        show_profile(str(tmp_path / "pipe"), None, None, "auto", False, None, None)


def test_the_subscriber_of_a_profile_ends_with_the_process_that_started_it() -> None:
    parent = (
        "import sys, time\n"
        "from maskcast.pipeline.cli.profile.profile import _listener\n"
        "with _listener('tcp://127.0.0.1:9') as listener:\n"
        "    print(listener.pid, flush=True)\n"
        "    time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        listener = Path(f"/proc/{int(process.stdout.readline())}")
        process.kill()
    wait_until(lambda: not listener.exists(), 60)


def test_the_subscriber_of_a_profile_ends_well_after_the_last_message() -> None:
    with Publisher("tcp://127.0.0.1:0", ("background",)) as publisher:
        with module._listener(publisher.endpoint) as listener:
            assert publisher.wait_for_subscribers(1, 60, ["cam1"])
            publisher.event("cam1", "ended", reason="end of file")
            wait_until(lambda: listener.poll() is not None, 60)
        assert listener.returncode == 0
