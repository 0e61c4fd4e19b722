from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import agreement
from maskcast.engines.bundle import open_bundle
from maskcast.engines.openvino.streams import Stream


def options(folder: Path) -> argparse.Namespace:
    return argparse.Namespace(bundle="default", child=str(folder), first=2, engines=1)


@pytest.fixture
def reference(tmp_path: Path) -> Path:
    agreement._write_reference(open_bundle("default"), True, tmp_path / "small.npz")
    return tmp_path


def test_right_answers_are_counted(reference: Path) -> None:
    found = agreement._run_engines(options(reference))
    assert found["engines"] == 1
    assert found["answers"] >= 4
    assert found["instances"] > 0
    assert found["rejected"] == found["differences"] == 0


def test_a_wrong_answer_is_a_difference(reference: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    segment = Stream.segment

    def wrong(stream: Any, *arguments: Any) -> Any:
        masks = segment(stream, *arguments)
        return np.clip(masks + np.float32(0.1), 0, 1)

    monkeypatch.setattr(Stream, "segment", wrong)
    found = agreement._run_engines(options(reference))
    assert found["differences"] > 0


def test_a_child_ended_by_a_signal_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    aborting = tmp_path / "python"
    aborting.write_text("#!/bin/sh\nkill -ABRT $$\n")
    aborting.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(aborting))
    asked = argparse.Namespace(bundle="default", perturb=False, cached=False)
    assert agreement._child(asked, str(tmp_path), 10, 5) == {"aborts": 1}
    assert capsys.readouterr().err == "engines 10 to 14: ended by SIGABRT\n"
