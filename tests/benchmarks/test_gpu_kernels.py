"""The benchmark of the kernels on the host driver."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.skipif(find_spec("pycuda") is None, reason="pycuda is not installed"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed"),
]


def test_the_dry_form_checks_and_times_everything(tmp_path):
    out = tmp_path / "report.json"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_kernels", "--dry", "--out", str(out)],
        cwd=Path(__file__).parents[2], env=dict(os.environ), capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(out.read_text())
    assert report["failed"] == {}
    assert report["device"] == "host driver"
    assert max(report["check"].values()) < 5e-3
    assert report["graph"] == "replayed, results equal"
    graphs = report["graphs"]
    assert graphs["engine"]["detections"] > 0
    assert graphs["engine"]["bytes_not_freed"] == 0
    assert graphs["parity"]["matched_least"] > 0.95
    assert graphs["capture"] == "replayed on another image, results equal"
    times = report["engine_host_time_us"]
    assert times["CUDA graphs, 0 busy threads"] < times["no CUDA graphs, 0 busy threads"]
