from pathlib import Path

import pytest
from witnesses import configured

from maskcast.engines.bundle import Bundle
from maskcast.engines.engine import Engine
from maskcast.engines.errors import InputError
from maskcast.pipeline.cli import run as module
from maskcast.pipeline.cli.run import run_to_end
from maskcast.pipeline.configuration.config import Config
from maskcast.pipeline.configuration.config_file import make_config


def test_a_run_that_ends_with_an_error_prints_its_final_figures(
    make_clip, timed_engine, tmp_path: Path, monkeypatch, capsys
) -> None:
    text = tmp_path / "text.mp4"
    text.write_text("this is no video\n" * 100)
    monkeypatch.setattr(module, "load_engine_for", lambda *_: timed_engine(0.002))
    with pytest.raises(InputError, match="not a video"):
        run_to_end(configured(make_clip(frames=40), text))
    lines = capsys.readouterr().err.splitlines()
    assert lines[-2].startswith("clip: captured 40, processed 40, dropped 0, ")
    assert lines[-1].endswith("now ended: not a video that FFmpeg can read")  # without the path


def test_a_run_that_fails_before_its_first_frame_prints_nothing_else(
    timed_engine, tmp_path: Path, monkeypatch, capsys
) -> None:
    text = tmp_path / "text.mp4"
    text.write_text("this is no video\n" * 100)
    monkeypatch.setattr(module, "load_engine_for", lambda *_: timed_engine())
    with pytest.raises(InputError, match="not a video"):
        run_to_end(configured(text))
    assert capsys.readouterr().err == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_run_whose_output_is_not_written_at_its_end_fails_with_the_reason(
    make_clip, timed_engine, monkeypatch
) -> None:
    monkeypatch.setattr(module, "load_engine_for", lambda *_: timed_engine(0.002))
    config = make_config(
        {"sources": [{"url": str(make_clip(frames=5))}], "outputs": {"jsonl": "/dev/full"}}
    )
    with pytest.raises(
        InputError,
        match="/dev/full: cannot be written: No space left on device; 5 processed frames are miss",
    ):
        run_to_end(config)


def test_a_run_limits_its_heaps_before_the_engine_makes_threads(monkeypatch) -> None:
    calls: list[str] = []

    def load(config: Config, bundle: Bundle) -> Engine:
        calls.append("load")
        raise InputError("no engine")

    monkeypatch.setattr(module, "limit_heaps", lambda: calls.append("limit"))
    monkeypatch.setattr(module, "load_engine_for", load)
    with pytest.raises(InputError, match="no engine"):
        run_to_end(make_config({"sources": [{"url": "test://64x48@5"}]}))
    assert calls == ["limit", "load"]
