from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.overhead import make_sources, measure_rounds, run_together

ROOT = Path(__file__).parents[2]


def test_the_parts_together_do_the_frames_of_all_sources(timed_engine: Any, make_clip: Any) -> None:
    engine = timed_engine(max_batch=2)
    sources = make_sources(str(make_clip(frames=6)), 3, plain=True)
    assert run_together(engine, sources, 5) > 0
    assert sum(engine.batches) == 15
    assert engine.held == 0


@pytest.mark.parametrize("part", ["detect", "segment"])
def test_an_error_of_a_part_ends_the_benchmark_while_the_others_wait_for_it(
    make_clip: Any, part: str
) -> None:
    # In its own process: the other threads are abandoned, and a process that is forked later cannot
    # free what they hold of FFmpeg's.
    code = f"""
from benchmarks.overhead import make_sources, run_together
from tests.conftest import TimedEngine

engine = TimedEngine()
engine.fails_at[{part!r}] = 2
run_together(engine, make_sources({str(make_clip(frames=20))!r}, 2, plain=True), 20)
"""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert done.stderr.splitlines()[-1].startswith("ZeroDivisionError")
    assert part in done.stderr


def test_each_round_is_reported_when_it_ends(
    timed_engine: Any, make_clip: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    sources = make_sources(str(make_clip(frames=4)), 2, plain=False)
    rounds = measure_rounds(timed_engine(), sources, 3, 2, "2 sources")
    assert all({"infer", "masks", "publish"} <= set(one.threads) for one in rounds)
    lines = capfd.readouterr().err.splitlines()
    assert [line.partition(":")[0] for line in lines] == [
        "2 sources, round 1 of 2",
        "2 sources, round 2 of 2",
    ]
