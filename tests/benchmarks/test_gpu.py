"""The GPU benchmark's dry form: all but the GPU."""

from __future__ import annotations

import json
from importlib.util import find_spec

import pytest

from maskcast.engines.bundle import default_bundle

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
    arguments += ["--repeat", "1", "--warm-up", "0", "--clip", str(clip)]
    main([*arguments, "--out", str(tmp_path / "gpu.json")])
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert report["dry"] is True
    fp16 = report["precisions"]["fp16"]
    assert set(fp16["built"]) == {"detector", "segmenter"}
    assert fp16["built"]["detector"]["computes_in"]["HALF"] > 70
    assert fp16["parity"]["matched"] == fp16["parity"]["torch"] == fp16["parity"]["engine"]
    assert fp16["time"]["1"]["total_ms"] > 0
    assert fp16["pipeline"]["processed"] == 3
    assert report["torch"]["eager_ms"] > 0
    table = capsys.readouterr().out
    assert "fp16, batch 1" in table
    assert "dry run on the CPU" in " ".join(table.split())
