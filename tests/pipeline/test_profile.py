import io

import msgspec
import pytest
from rich.console import Console

from engines.errors import InputError
from pipeline.config import SourceConfig
from pipeline.profile import Report, profile, report_table


def test_the_default_model_is_profiled_on_a_file(make_clip) -> None:
    report = profile(str(make_clip(frames=5, width=128, height=96)), limit=4)
    fields = msgspec.json.decode(msgspec.json.encode(report))
    assert set(fields) == {
        "frames", "wall_s", "fps", "engine_fps", "captured", "processed", "dropped",
        "latency_ms", "stages",
    }  # fmt: skip
    assert set(fields["latency_ms"]) == {"p50", "p95", "p99"}
    assert list(fields["stages"]) == ["decode", "preprocess", "infer", "masks", "publish"]
    for stage in fields["stages"].values():
        assert set(stage) == {"p50_ms", "p95_ms", "p99_ms", "busy"}
        assert 0 < stage["p50_ms"] <= stage["p95_ms"] <= stage["p99_ms"]
        assert 0 < stage["busy"] <= 1.01
    assert (report.frames, report.captured, report.processed, report.dropped) == (4, 4, 4, 0)
    assert report.fps == pytest.approx(report.frames / report.wall_s)


def test_a_pipeline_keeps_up_with_an_engine_that_needs_no_cpu(make_clip, timed_engine) -> None:
    engine = timed_engine(0.015, 0.001)
    report = profile(str(make_clip(frames=60)), engine)
    assert report.engine_fps == pytest.approx(1 / 0.016, rel=0.2)
    assert report.fps > 0.9 * report.engine_fps
    assert report.stages["infer"].busy > 0.7
    assert report.stages["infer"].p50_ms == pytest.approx(15, abs=3)
    assert not engine.closed


def test_a_long_file_is_timed_on_frames_from_all_of_it(make_clip, timed_engine) -> None:
    engine, progress = timed_engine(0.002), []
    report = profile(
        str(make_clip(frames=200)),
        engine,
        on_progress=lambda done, total: progress.append((done, total)),
    )
    assert report.processed == 200
    assert progress == sorted(progress)
    assert progress[-1] == (200 + 2 * 64, 200 + 2 * 64)
    shapes = 1
    before_and_after = 2 * (64 + shapes)
    assert len(engine.batches) == 200 + before_and_after


def test_frames_that_a_live_source_loses_are_in_the_report(timed_engine) -> None:
    source = SourceConfig(url="test://64x48@100")
    report = profile(source, timed_engine(0.02), limit=30)
    assert report.captured == 30
    assert report.dropped > 10
    assert report.captured == report.processed + report.dropped


def test_a_source_that_is_not_there_is_named(timed_engine, tmp_path) -> None:
    with pytest.raises(InputError, match=r"gone\.mp4"):
        profile(str(tmp_path / "gone.mp4"), timed_engine())


def test_a_report_is_shown_as_a_table() -> None:
    report = msgspec.convert(
        {
            "frames": 100,
            "wall_s": 4.0,
            "fps": 25.0,
            "engine_fps": 26.3,
            "captured": 120,
            "processed": 100,
            "dropped": 20,
            "latency_ms": {"p50": 80.5, "p95": 91.0, "p99": 99.0},
            "stages": {"infer": {"p50_ms": 35.25, "p95_ms": 40.0, "p99_ms": 41.0, "busy": 0.93}},
        },
        Report,
    )
    console = Console(file=io.StringIO(), width=120)
    console.print(report_table(report))
    text = console.file.getvalue()
    for figure in ("35.25", "93%", "95% of the bare engine's 26.3", "dropped 20", "p95 91.0 ms"):
        assert figure in text
