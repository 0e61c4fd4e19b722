import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_loss_is_reported_also_by_a_subscriber_that_was_stopped():
    options = ["--counts", "2", "--frames", "1500", "--fps", "1000", "--json"]
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.subscribers", *options],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
    )
    alone, together = json.loads(result.stdout)
    assert (alone["reading"], alone["stopped"]) == (2, 0)
    assert (together["reading"], together["stopped"]) == (2, 1)
    for row in (alone, together):
        assert row["exact"]
        assert row["reported"] == row["lost_by_readers"] + row["lost_by_stopped"]
        assert 0 < row["p50_ms"] <= row["p99_ms"] <= row["max_ms"]
        assert 0 < row["cpu_max_ms"] <= row["max_ms"] + 0.1
    assert together["lost_by_stopped"] > 0
