import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.soak import Sample, drift, slope_per_hour, summarise, warmed_up

ROOT = Path(__file__).parents[2]


def sample(at_s: float, rss_mib: float, p50_ms: float | None = 50.0) -> Sample:
    return Sample(at_s, rss_mib, 20, 10, 5, 0, p50_ms, p50_ms, healthy=True)


def test_a_slope_is_found_through_noise_and_outliers():
    times_s = np.arange(0, 3600, 30.0)
    noise = np.random.default_rng(0).normal(0, 0.5, len(times_s))
    values = 300 + 6 * times_s / 3600 + noise
    values[::15] += 80
    assert slope_per_hour(times_s, values) == pytest.approx(6, abs=0.5)
    assert slope_per_hour([1.0], [300.0]) == 0


def test_a_drift_is_between_the_first_and_the_last_tenth():
    assert drift([10.0] * 10 + [12.0] * 80 + [15.0] * 10) == 5
    assert drift([]) == 0


def test_what_happens_while_it_warms_up_does_not_count():
    samples = [sample(at_s, 200 + at_s if at_s < 12 else 300) for at_s in range(61)]
    assert warmed_up(samples)[0].at_s == 12
    assert summarise(samples)["rss_slope_mib_per_h"] == 0
    hours = [sample(60.0 * minute, 300) for minute in range(300)]
    assert warmed_up(hours)[0].at_s == 600


def test_a_time_in_which_nothing_came_has_no_latency():
    found = summarise([sample(0, 300, None), sample(1, 300, 40.0), sample(2, 300, None)])
    assert found["p50_ms"] == 40
    assert found["healthy_share"] == 1


def test_a_real_process_is_soaked_and_ends_well(tmp_path: Path):
    options = ["--minutes", "0.08", "--streams", "2", "--sample-every", "0.5"]
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.soak", *options, "--out", tmp_path / "soak.json"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "soak.json").read_bytes())
    assert (found["exit_code"], found["delivering_at_the_end"]) == (0, 2)
    assert found["ended_within_s"] < 60  # it takes half a second on a quiet machine
    assert found["frames"] > 3
    assert 50 < found["rss_mib"] <= found["rss_peak_mib"] < 4000
    assert len(found["samples_all"]) >= 4
    assert "rss_slope_mib_per_h" in result.stdout
