"""The outputs of a configuration, and what a run does to existing files."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import av
import pytest
from witnesses import configured

from maskcast.engines.errors import InputError
from maskcast.pipeline.configuration.config import Config, OutputConfig, SourceConfig
from maskcast.pipeline.configuration.config_file import make_config, override
from maskcast.pipeline.outputs.outputs import check_outputs
from maskcast.pipeline.pipeline import Pipeline


def with_outputs(*urls: Path | str, **outputs: Any) -> Config:
    shown = {key: str(value) for key, value in outputs.items() if value is not None}
    return make_config({**sources(*urls), "publish": None, "outputs": shown})


def sources(*urls: Path | str) -> dict[str, Any]:
    return {"sources": [{"url": str(url)} for url in urls]}


def test_a_pipeline_writes_the_outputs_of_its_configuration(
    make_clip, timed_engine, tmp_path: Path
) -> None:
    config = Config(
        sources=(SourceConfig(url=str(make_clip("a.mp4", frames=6))),),
        publish=None,
        outputs=OutputConfig(save=str(tmp_path / "out.mkv"), jsonl=str(tmp_path / "out.jsonl")),
    )
    Pipeline(config, timed_engine()).run()
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 6
    with av.open(str(tmp_path / "out.mkv")) as container:
        assert "matroska" in container.format.name
        assert len(list(container.decode(video=0))) == 6


def test_the_first_configured_source_gets_the_plain_name(
    make_clip, timed_engine, tmp_path: Path
) -> None:
    small, large = make_clip("a.mp4", width=32, height=32), make_clip("b.mp4", width=96, height=64)
    slow_first = {"url": str(large), "policy": "latest"}
    config = override(configured(slow_first, small), {"outputs.save": str(tmp_path / "out.mp4")})
    Pipeline(config, timed_engine()).run()
    widths = {}
    for name in ("out.mp4", "out-a.mp4"):
        with av.open(str(tmp_path / name)) as container:
            widths[name] = container.streams.video[0].width
    assert widths == {"out.mp4": 96, "out-a.mp4": 32}


@pytest.mark.parametrize("key", ["save", "jsonl"])
def test_an_output_that_is_a_source_is_refused_and_nothing_is_touched(
    key: str, make_clip, timed_engine, tmp_path: Path
) -> None:
    clip = make_clip("clip.mp4")
    before = clip.read_bytes()
    link = tmp_path / "link.mp4"
    link.symlink_to(clip)
    for output in (clip, link):
        with pytest.raises(InputError, match="it is the input"):
            Pipeline(with_outputs(clip, **{key: output}), timed_engine()).run()
    assert clip.read_bytes() == before


def test_the_file_of_a_second_source_may_be_no_input_either(make_clip, tmp_path: Path) -> None:
    config = with_outputs(
        make_clip("a.mp4"), make_clip("b.mp4"), make_clip("out-b.mp4"), save=tmp_path / "out.mp4"
    )
    with pytest.raises(InputError, match=r"out-b\.mp4: cannot be written: it is the input"):
        check_outputs(config)


def test_two_outputs_have_two_names(tmp_path: Path) -> None:
    config = with_outputs("test://64x48@5", save=tmp_path / "o.mp4", jsonl=tmp_path / "o.mp4")
    with pytest.raises(InputError, match="two outputs have this name"):
        check_outputs(config)


@pytest.mark.parametrize("why", ["source", "model", "endpoint"])
def test_a_run_that_fails_leaves_files_of_earlier_runs_alone(
    why: str, make_clip, timed_engine, tmp_path: Path
) -> None:
    outputs = {"save": tmp_path / "old.mp4", "jsonl": tmp_path / "old.jsonl"}
    for path in outputs.values():
        path.write_text("precious")
    clip = tmp_path / "typo.mp4" if why == "source" else make_clip()
    config, engine = with_outputs(clip, **outputs), timed_engine()
    if why == "model":
        config, engine = override(config, {"model.bundle": "nope"}), None
    with socket.create_server(("127.0.0.1", 0)) as taken:
        if why == "endpoint":
            port = taken.getsockname()[1]
            config = override(config, {"publish.endpoint": f"tcp://127.0.0.1:{port}"})
        with pytest.raises(InputError):
            Pipeline(config, engine).run()
    assert [path.read_text() for path in outputs.values()] == ["precious", "precious"]
    assert sorted(tmp_path.glob(".*")) == []


@pytest.mark.parametrize(
    ("outputs", "problem"),
    [
        ({"save": "out.gif"}, r"outputs: save: 'out\.gif': use a name that ends in \.mp4 or \.mkv"),
        (
            {"save": "out.mp4", "segment": "10"},
            r"segment: '10': use a number and a unit, as in 30s",
        ),
        ({"save": "out.mp4", "segment_size": "0MB"}, r"segment_size: '0MB': use a number and a un"),
        ({"append": True}, "append: there is no jsonl file"),
        ({"jsonl": "o.jsonl", "append": True, "segment": "1h"}, "append: not possible with"),
        ({"segment": "1h"}, "segment: there is no file to split"),
    ],
)
def test_outputs_that_contradict_each_other_are_refused(
    outputs: dict[str, Any], problem: str
) -> None:
    with pytest.raises(InputError, match=problem):
        make_config({**sources("test://64x48@5"), "outputs": outputs})


def test_times_and_sizes_are_read() -> None:
    config = OutputConfig(save="out.mp4", segment="1.5h", segment_size="500MB")
    assert (config.segment_s, config.segment_bytes) == (5400.0, 500e6)
    assert (OutputConfig().segment_s, OutputConfig().segment_bytes) == (None, None)


FULL = """
import resource, sys
from tests.conftest import TimedEngine
from maskcast.pipeline.configuration.config_file import make_config
from maskcast.pipeline.log import configure
from maskcast.pipeline.pipeline import Pipeline

configure()
resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
config = make_config({
    "sources": [{"url": sys.argv[1]}], "publish": None,
    "outputs": {"save": sys.argv[2], "jsonl": sys.argv[3]},
})
pipeline = Pipeline(config, TimedEngine())
pipeline.run()
source, = pipeline.stats().sources
print(source.processed, pipeline.stats().outputs, pipeline.health().healthy)
"""


def test_a_full_disk_ends_the_recording_and_nothing_else(make_clip, tmp_path: Path) -> None:
    clip = make_clip("clip.mp4", frames=40)
    paths = [tmp_path / "out.mp4", tmp_path / "out.jsonl"]
    done = subprocess.run(
        [sys.executable, "-c", FULL, clip, *paths],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},  # for the engine of the tests
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("40 {'jsonl': 'File too large', 'save': 'File too large'} True")
    failures = [line for line in done.stderr.splitlines() if "recording_failed" in line]
    assert len(failures) == 2, done.stderr
    assert "Traceback" not in done.stderr
    lines = paths[1].read_bytes()
    assert lines.endswith(b"\n")
    assert all(json.loads(line)["source"] == "clip" for line in lines.splitlines())
    assert sorted(tmp_path.glob(".*")) == []
