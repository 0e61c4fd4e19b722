from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from maskcast.pipeline.cli.plot import HEIGHT, WIDTH, draw_plot, nice_ticks, write_plot
from maskcast.pipeline.cli.profile import profile
from maskcast.pipeline.cli.report import Report
from maskcast.pipeline.monitor.trace import Passage, Trace

INFER, DROP = (213, 94, 0), (200, 30, 30)


@pytest.fixture(scope="module")
def profiled(timed_engine) -> tuple[Report, list[Passage]]:
    trace = Trace()
    report = profile("test://64x48@100", timed_engine(0.03), limit=60, trace=trace)
    return report, trace.passages


def pixels_of(image: Image.Image, colour: tuple[int, int, int], rows: slice) -> int:
    return int((np.asarray(image)[rows] == colour).all(axis=2).sum())


def test_the_stage_that_takes_most_of_the_time_takes_most_of_the_picture(
    profiled: tuple[Report, list[Passage]], tmp_path: Path
) -> None:
    report, passages = profiled
    write_plot(tmp_path / "plot.png", report, passages, "test://64x48@100")
    with Image.open(tmp_path / "plot.png") as image:
        assert (image.format, image.size, image.mode) == ("PNG", (WIDTH, HEIGHT), "RGB")
        mean_frame = slice(140, 176)
        share = pixels_of(image, INFER, mean_frame) / (36 * (1160 - 40))
        works_ms = report.stages["infer"].mean_ms
        latency_ms = sum(
            stage.mean_ms + (stage.wait.mean_ms if stage.wait else 0)
            for stage in report.stages.values()
        )
        assert share == pytest.approx(works_ms / latency_ms, abs=0.06)  # less the label
        over_time = slice(560, 800)
        assert pixels_of(image, INFER, over_time) > 10_000


def test_drops_are_drawn_below_the_latency(profiled: tuple[Report, list[Passage]]) -> None:
    report, passages = profiled
    assert report.dropped > 10
    below = slice(809, 818)
    assert pixels_of(draw_plot(report, passages, ""), DROP, below) > 50
    published = [passage for passage in passages if passage.drop is None]
    assert pixels_of(draw_plot(report, published, ""), DROP, below) == 0


def test_what_has_published_nothing_can_be_drawn(profiled: tuple[Report, list[Passage]]) -> None:
    report, passages = profiled
    dropped = [passage for passage in passages if passage.drop is not None]
    assert draw_plot(report, dropped, "").size == (WIDTH, HEIGHT)
    assert draw_plot(report, [], "").size == (WIDTH, HEIGHT)


@settings(max_examples=100)
@given(st.floats(1e-3, 1e6))
def test_ticks_are_few_even_and_reach_the_largest_value(most: float) -> None:
    ticks = nice_ticks(most)
    steps = np.diff(ticks)
    assert ticks[0] == 0
    assert most <= ticks[-1] * (1 + 1e-6)
    assert 3 <= len(ticks) <= 8
    assert steps == pytest.approx(np.full(len(steps), steps[0]))
