from __future__ import annotations

from typing import Any

import pytest

from benchmarks.overhead import make_sources, measure_rounds, run_together


def test_the_parts_together_do_the_frames_of_all_sources(timed_engine: Any, make_clip: Any) -> None:
    engine = timed_engine(max_batch=2)
    sources = make_sources(str(make_clip(frames=6)), 3, plain=True)
    assert run_together(engine, sources, 5) > 0
    assert sum(engine.batches) == 15
    assert engine.held == 0


@pytest.mark.parametrize("part", ["detect", "segment"])
def test_an_error_of_a_part_is_raised_while_the_others_wait_for_it(
    timed_engine: Any, make_clip: Any, part: str
) -> None:
    engine = timed_engine()
    engine.fails_at[part] = 2
    sources = make_sources(str(make_clip(frames=20)), 2, plain=True)
    with pytest.raises(ZeroDivisionError, match=part):
        run_together(engine, sources, 20)


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
