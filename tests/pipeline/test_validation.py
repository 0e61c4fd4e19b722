"""``config check`` and ``run`` refuse the same configurations, before a model is loaded."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from witnesses import configured

from maskcast.engines import bundle
from maskcast.engines.errors import InputError
from maskcast.engines.openvino import engine
from maskcast.pipeline.cli import run
from maskcast.pipeline.cli.setup.configuration import check
from maskcast.pipeline.configuration.config import Config
from maskcast.pipeline.configuration.config_file import load_config, make_config
from maskcast.pipeline.pipeline import Pipeline
from maskcast.pipeline.wire.curve import new_keys
from maskcast.pipeline.wire.rights import make_rights, write_rights

CAMERA = "rtsp://192.0.2.1/stream"
PROBLEMS: list[tuple[dict[str, Any], str]] = [
    ({"sources": ["absent.mp4"]}, "absent.mp4: no such file"),
    ({"outputs": {"save": "absent/out.mp4"}}, "absent/out.mp4: cannot be written: no such folder"),
    ({"sources": ["a.mp4"], "outputs": {"save": "a.mp4"}}, "a.mp4: cannot be written: it is the i"),
    ({"publish": {"endpoint": "tcp://*"}}, "invalid endpoint 'tcp://*'"),
    ({"publish": {"gateways": ["gateway"]}}, "invalid endpoint 'gateway'"),
    (
        {"publish": {"curve": {"secret_key": "absent.key_secret", "allowed_clients": "clients"}}},
        "absent.key_secret",
    ),
    (
        {"publish": {"curve": {"secret_key": "own.key_secret", "allowed_clients": "empty"}}},
        "empty",
    ),
    ({"control": "tcp://*:5556"}, "tcp://*:5556: anyone on the network could control this"),
    ({"control": "tcp://192.0.2.7:5556"}, "anyone on the network could control this"),
    ({"control": "tcp://[2001:db8::7]:5556"}, "anyone on the network could control this"),
    ({"control": "5556"}, "invalid endpoint '5556'"),
    ({"control": {"endpoint": "ipc://c", "allow": ["rtsp//x"]}}, "invalid rule 'rtsp//x'"),
    (
        {"control": {"endpoint": "tcp://*:5556", "allowed_clients": "clients"}},
        "control.allowed_clients: there is no key for the server",
    ),
    ({"metrics": {"address": "9100"}}, "invalid address for metrics '9100'"),
    ({"model": {"bundle": "absent"}}, "absent: not a bundle (no such folder)"),
    ({"model": {"bundle": "damaged"}}, "damaged"),
    ({"model": {"classes": ["persn"]}}, "the model has no class 'persn'; did you mean 'person'?"),
    (
        {
            "sources": [
                {
                    "url": CAMERA,
                    "zones": [
                        {"name": "a", "polygon": [[0, 0], [1, 0], [1, 1]], "labels": ["cat"]}
                    ],
                }
            ]
        },
        "the model has no class 'cat'",
    ),
]


@pytest.fixture
def folder(make_clip, tmp_path: Path, monkeypatch) -> Path:
    """Change to a folder with a clip, keys and a damaged bundle."""
    monkeypatch.chdir(tmp_path)
    make_clip("a.mp4")
    for name in ("empty", "clients", "damaged"):
        (tmp_path / name).mkdir()
    (tmp_path / "damaged" / "manifest.json").write_text("{")
    new_keys(tmp_path / "own")
    new_keys(tmp_path / "clients" / "friend")
    write_rights(tmp_path / "clients" / "friend.key", make_rights(["*"], control=True))
    return tmp_path


@pytest.mark.parametrize(("changes", "problem"), PROBLEMS, ids=[p[:30] for _, p in PROBLEMS])
def test_a_check_and_a_run_refuse_the_same_before_the_model_is_loaded(
    changes: dict[str, Any], problem: str, folder: Path, monkeypatch
) -> None:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({"sources": [CAMERA]} | changes))
    monkeypatch.setattr(run, "load_engine_for", None)
    before = sorted(folder.rglob("*"))
    for refuses in (lambda: check(path), lambda: run.run_to_end(load_config(path))):
        with pytest.raises(InputError, match=re.escape(problem)):
            refuses()
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("start", [run.run_to_end, lambda config: Pipeline(config).run()])
def test_a_run_reads_the_files_of_its_bundle_once(
    start: Callable[[Config], object], make_clip, timed_engine, monkeypatch
) -> None:
    read: list[str] = []
    monkeypatch.setattr(bundle, "_check", lambda path, expected: read.append(path.name))
    monkeypatch.setattr(engine, "OpenVinoEngine", lambda *_, **__: timed_engine())
    start(configured(make_clip()))
    assert read == ["detector.onnx", "segmenter.onnx", "poser.onnx"]


def test_a_configuration_with_everything_passes(folder: Path) -> None:
    config = {
        "sources": [CAMERA, {"url": "absent.mp4", "required": False}, "a.mp4"],
        "outputs": {"save": "out.mp4", "jsonl": "out.jsonl"},
        "publish": {
            "endpoint": "tcp://*:5555",
            "curve": {"secret_key": "own.key_secret", "allowed_clients": "clients"},
        },
        "control": {"endpoint": "tcp://*:5556", "allowed_clients": "clients"},
        "metrics": {"address": "*:9100"},
        "model": {"classes": ["person"]},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    assert "valid" in check(folder / "config.yaml")


def test_a_pipeline_with_an_engine_of_its_own_needs_no_bundle(folder: Path, timed_engine) -> None:
    raw = {"sources": ["a.mp4"], "publish": None, "model": {"bundle": "absent"}}
    Pipeline(make_config(raw), timed_engine()).run()
    with pytest.raises(InputError, match="no class 'cat'"):
        Pipeline(make_config(raw | {"model": {"classes": ["cat"]}}), timed_engine()).run()
