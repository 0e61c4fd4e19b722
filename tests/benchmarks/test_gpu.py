"""The GPU benchmark's dry form: all but the GPU."""

from __future__ import annotations

import json
import time
from importlib.util import find_spec
from unittest.mock import ANY

import numpy as np
import pytest

from maskcast.engines.bundle import default_bundle
from maskcast.engines.engine import Detections
from maskcast.engines.image import NetworkImage

pytestmark = [
    pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx is not installed"),
    pytest.mark.skipif(
        not (default_bundle() / "detector.onnx").exists(), reason="the default bundle is not built"
    ),
]


def test_the_dry_form_builds_compares_and_writes_both_reports(tmp_path, capsys, make_clip):
    from benchmarks.gpu import main

    clip = make_clip("clip.mp4", frames=3)
    arguments = ["--dry", "--size", "96x160", "--batch", "2", "--precision", "fp16"]
    arguments += ["--repeat", "1", "--settle", "0", "--clip", str(clip)]
    main([*arguments, "--out", str(tmp_path / "gpu.json")])
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert report["dry"] is True
    fp16 = report["precisions"]["fp16"]
    assert set(fp16["built"]) == {"detector", "segmenter", "poser"}
    assert fp16["built"]["detector"]["computes_in"]["HALF"] > 70
    assert fp16["parity"]["matched"] == fp16["parity"]["torch"] == fp16["parity"]["engine"]
    assert fp16["time"]["1"]["total_ms_100_boxes"] > 0
    assert "pose_ms_100_boxes" in fp16["time"]["1"]
    assert fp16["time"]["1"]["warm_up"] == {"calls": 0, "seconds": ANY, "stable": False}
    assert report["failed"] == {}
    assert fp16["pipeline"]["processed"] == 3
    assert report["torch"]["eager_ms"] > 0
    table = capsys.readouterr().out
    assert "fp16, batch 1" in table
    assert "dry run on the CPU" in " ".join(table.split())


def test_a_step_that_fails_is_recorded_and_the_next_one_runs(tmp_path, monkeypatch):
    from benchmarks import gpu

    def fail(*_):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(gpu, "parity", fail)
    arguments = ["--dry", "--size", "64x96", "--batch", "1", "--precision", "fp32"]
    with pytest.raises(SystemExit):
        gpu.main(
            [*arguments, "--repeat", "1", "--settle", "0", "--out", str(tmp_path / "gpu.json")]
        )
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert report["failed"] == {"parity": "RuntimeError: no compiler"}
    assert report["precisions"]["fp32"]["time"]["1"]["total_ms_8_boxes"] > 0
    assert report["torch"]["eager_ms"] > 0


def test_warm_up_ends_when_times_have_become_stable():
    from benchmarks.gpu import settle

    calls = iter([0.02] * 5 + [0.002] * 100)
    outcome = settle(lambda: time.sleep(next(calls)), 10, window=5)
    assert outcome["stable"]
    assert outcome["calls"] >= 10


def test_boxes_lie_inside_of_their_images():
    from benchmarks.gpu import with_boxes

    image = NetworkImage(np.zeros((64, 96, 3), np.uint8), (64, 96), (64, 96))
    none = np.empty(0, "f4")
    found = with_boxes(Detections([image] * 2, none, none, none, none, None, lambda: None), 8)
    assert found.image_index.tolist() == [0] * 8 + [1] * 8
    assert (found.boxes >= 0).all()
    assert (found.boxes <= [96, 64, 96, 64]).all()
    assert (found.boxes[:, 2:] > found.boxes[:, :2]).all()
