import io

import msgspec
import pytest
from rich.console import Console

from maskcast.engines.memory import Memory, read_memory
from maskcast.pipeline.cli.profile.alone import Alone
from maskcast.pipeline.cli.profile.decoding import DecodingReport
from maskcast.pipeline.cli.profile.report import (
    Report,
    make_report,
    name_bottleneck,
    processor_times,
    report_table,
)
from maskcast.pipeline.stats import Meter

REPORT = msgspec.convert(
    {
        "frames": 100,
        "wall_s": 4.0,
        "fps": 25.0,
        "engine_fps": 26.3,
        "captured": 120,
        "processed": 100,
        "dropped": 20,
        "rates": {"captured": 30.0, "processed": 25.0, "dropped": 5.0},
        "drops": {"preprocess": {"replaced": 18, "unreadable": 2}},
        "latency_ms": {"p50": 80.5, "p95": 91.0, "p99": 99.0},
        "stages": {
            "infer": {
                "p50_ms": 35.25,
                "p95_ms": 40.0,
                "p99_ms": 41.0,
                "mean_ms": 36.0,
                "busy": 0.93,
                "wait": {"p50_ms": 12.75, "p95_ms": 20.0, "p99_ms": 21.0, "mean_ms": 14.0},
                "share": 0.62,
            }
        },
        "processor_ms": {
            "run": 41.25,
            "decode": 2.0,
            "resize": 1.0,
            "engine": 36.9,
            "encode": 0.1,
        },
        "overhead": 0.03125,
        "rss_bytes": 300_000_000,
        "peak_bytes": 412_000_000,
        "decoding": {"decoder": "software", "alone_ms": {}, "absent": {"cuda": "no driver"}},
        "bottleneck": "infer is busy 93% of the time",
    },
    Report,
)


def shown(width: int) -> str:
    file = io.StringIO()
    Console(file=file, width=width).print(report_table(REPORT, width))
    return file.getvalue()


@pytest.mark.parametrize("width", [60, 80])
def test_every_row_of_the_table_fits_the_terminal(width: int) -> None:
    text = shown(width)
    assert "…" not in text
    assert "..." not in text
    assert all(len(line) <= width for line in text.splitlines())
    (row,) = [line.split() for line in text.splitlines() if line.strip().startswith("infer ")][:1]
    percentiles = ["35.2", "40.0", "41.0"], ["12.8", "20.0", "21.0"]
    work, wait = percentiles if width == 80 else (times[:2] for times in percentiles)
    assert row == ["infer", *work, "93%", *wait, "62%"]


def test_a_report_is_shown_as_a_table() -> None:
    text = shown(120)
    for figure in (
        "35.2",
        "93%",
        "12.8",
        "62%",
        "95% of the bare engine's 26.3",
        "dropped 20 (18 replaced before preprocess, 2 unreadable before preprocess)",
        "per second: captured 30.0, processed 25.0, dropped 5.0",
        "p95 91.0 ms",
        "processor time per frame: 41.2 ms, overhead 3.1 %",
        "alone: decode 2.00, resize 1.00, engine 36.90, encode 0.10 ms",
        "memory: 300 MB, peak 412 MB",
        "decoding: in software; cuda: no driver",
        "bottleneck: infer is busy 93% of the time",
    ):
        assert figure in text


@pytest.mark.parametrize(
    ("busy", "paced", "sentence"),
    [
        (
            {"infer": 0.97, "masks": 0.2},
            False,
            "infer is busy 97% of the time; every other stage waits for it, none of them busy for "
            "more than 20%",
        ),
        (
            {"infer": 0.97, "masks": 0.9},
            False,
            "masks and infer are each busy for more than 80% of the time; together "
            "they limit the speed",
        ),
        (
            {"infer": 0.45, "masks": 0.2},
            True,
            "the source: it delivers 10.0 frames/s, and no stage is busy for more than 45% of the "
            "time (infer)",
        ),
        (
            {"infer": 0.6, "masks": 0.55},
            False,
            "no stage alone: infer, the busiest, works 60% of the time; the stages wait for one "
            "another or for a processor",
        ),
        ({}, False, "nothing was processed"),
    ],
)
def test_the_bottleneck_is_named_with_a_reason(
    busy: dict[str, float], paced: bool, sentence: str
) -> None:
    assert name_bottleneck(busy, captured_fps=10.0, paced=paced) == sentence


def test_a_report_of_nothing_can_be_made() -> None:
    report = make_report(
        Meter(["a"]).stats(),
        Alone(frames=10, engine_wall_s=1.0),
        Memory(1, 2),
        DecodingReport("software", {}, {}),
        paced=False,
        processor_s=1.0,
    )
    assert (report.engine_fps, report.processor_ms, report.overhead) == (10, None, None)
    assert (report.frames, report.fps, report.bottleneck) == (0, 0, "nothing was processed")


def test_memory_that_is_taken_is_seen() -> None:
    before = read_memory()
    held = bytearray(b"x") * 50_000_000
    after = read_memory()
    assert after.rss_bytes - before.rss_bytes > 40e6
    assert after.peak_bytes >= after.rss_bytes
    del held
    assert read_memory().peak_bytes > after.peak_bytes - 5e6  # the kernel counts roughly


def test_processor_time_is_per_frame_of_what_was_measured() -> None:
    alone = Alone(
        frames=10, engine_wall_s=0.5, resize_s=0.01, engine_s=0.2, encode_s=0.001, decoded=40,
        decode_s=0.08,
    )  # fmt: skip
    spent = processor_times(40, 1.0, alone)
    assert spent.run == pytest.approx(25)
    found = [spent.decode, spent.resize, spent.engine, spent.encode]
    assert found == pytest.approx([2, 1, 20, 0.1])
    assert spent.alone == pytest.approx(23.1)
    assert (alone + alone).decoded == 80
