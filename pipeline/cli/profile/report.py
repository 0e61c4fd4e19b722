"""Report: where a pipeline's time goes, as figures, as a table, and in one sentence."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import msgspec
from rich import box
from rich.console import Group
from rich.table import Table

from maskcast.engines.memory import Memory
from maskcast.pipeline.cli.profile.alone import Alone
from maskcast.pipeline.cli.profile.decoding import DecodingReport
from maskcast.pipeline.durations import Distribution
from maskcast.pipeline.frame import POSE
from maskcast.pipeline.stats import RECORD, StageStats, Stats

BUSY = 0.8
"""A stage that is busy for more than this share of the time is the bottleneck."""

WIDE = 76
"""Minimum width of a terminal, in columns, for the 99th percentiles."""


class Times(msgspec.Struct, frozen=True):
    """The 50th, 95th and 99th percentile and the mean over frames, milliseconds."""

    p50_ms: float
    p95_ms: float
    p99_ms: float
    mean_ms: float


class LatencyReport(msgspec.Struct, frozen=True):
    """Percentiles of the time from the start of decoding to publication, milliseconds."""

    p50: float
    p95: float
    p99: float


class StageReport(Times, frozen=True):
    """A stage's work on one frame.

    Attributes:
        busy: share of the wall time that it worked, 0..1.
        wait: how long a frame waited for it; None for a stage without an inbox.
        share: share of a frame's time from decoding to publication that it spent in this stage and
            waiting for it, 0..1; 0 for ``record``, which comes after publication.
    """

    busy: float
    wait: Times | None
    share: float


class Rates(msgspec.Struct, frozen=True):
    """Frames per second."""

    captured: float
    processed: float
    dropped: float


class ProcessorTimes(msgspec.Struct, frozen=True):
    """Processor time per frame, all cores together, milliseconds.

    Attributes:
        run: the pipeline, without its subscriber.
        decode, resize, engine, encode: these parts alone.
    """

    run: float
    decode: float
    resize: float
    engine: float
    encode: float

    @property
    def alone(self) -> float:
        """The sum of the parts."""
        return self.decode + self.resize + self.engine + self.encode

    @property
    def overhead(self) -> float:
        """The processor time that the pipeline adds to its parts, as a share of the parts."""
        return self.run / self.alone - 1


class Report(msgspec.Struct, frozen=True):
    """The result of a profile.

    Attributes:
        frames: frames published, which ``fps`` counts.
        wall_s: seconds from the start of decoding the first frame to the publication of the last.
        fps: frames per second of the whole pipeline.
        engine_fps: frames per second of the bare engine, detection and masks, on the same frames.
        captured, processed, dropped: frames read, published, and lost in between.
        rates: the same per second.
        drops: frames lost, by stage, then reason.
        latency_ms: from the start of decoding to publication.
        stages: by name, in the order that a frame passes them.
        processor_ms: processor time per frame; None for a live source and an interrupted profile.
        overhead: processor time of the pipeline divided by that of its parts alone, minus 1. Tracks
            and zones count as overhead. None without ``processor_ms``.
        rss_bytes: resident memory of the process at the end, including the model's.
        peak_bytes: peak resident memory of the process.
        decoding: what decoded the source, and whether hardware helps.
        bottleneck: what limits the speed and why, one sentence.
    """

    frames: int
    wall_s: float
    fps: float
    engine_fps: float
    captured: int
    processed: int
    dropped: int
    rates: Rates
    drops: dict[str, dict[str, int]]
    latency_ms: LatencyReport
    stages: dict[str, StageReport]
    processor_ms: ProcessorTimes | None
    overhead: float | None
    rss_bytes: int
    peak_bytes: int
    decoding: DecodingReport
    bottleneck: str


def make_report(
    stats: Stats,
    alone: Alone,
    memory: Memory,
    decoding: DecodingReport,
    *,
    paced: bool,
    processor_s: float | None,
) -> Report:
    """Combine the figures of a pipeline with those of its parts.

    Args:
        stats: the pipeline's final figures.
        alone: the times of its parts alone.
        memory: the process's memory.
        decoding: what decoded the source.
        paced: whether frames arrive at the source's own pace, as a camera's do.
        processor_s: processor time of the pipeline, seconds; None if it cannot be compared with its
            parts.
    """
    processor_ms = None
    if processor_s is not None and stats.processed:
        processor_ms = processor_times(stats.processed, processor_s, alone)
    drops: dict[str, dict[str, int]] = {}
    for (stage, reason), count in stats.dropped.items():
        drops.setdefault(stage, {})[reason] = count
    dropped = stats.dropped.total()
    wall_s = stats.wall_s or 1.0
    return Report(
        frames=stats.processed,
        wall_s=stats.wall_s,
        fps=stats.fps,
        engine_fps=alone.frames / alone.engine_wall_s,
        captured=stats.captured,
        processed=stats.processed,
        dropped=dropped,
        rates=Rates(stats.captured / wall_s, stats.fps, dropped / wall_s),
        drops=drops,
        latency_ms=LatencyReport(*(stats.latency_ms or (0.0, 0.0, 0.0))),
        stages=_stage_reports(stats.stages),
        processor_ms=processor_ms,
        overhead=None if processor_ms is None else processor_ms.overhead,
        rss_bytes=memory.rss_bytes,
        peak_bytes=memory.peak_bytes,
        decoding=decoding,
        bottleneck=name_bottleneck(
            _busy(stats.stages),
            captured_fps=stats.captured / wall_s,
            paced=paced,
        ),
    )


def _busy(stages: Mapping[str, StageStats]) -> dict[str, float]:
    """Return the share of the time that each stage works; ``pose`` is work of ``masks``."""
    busy = {name: stage.busy for name, stage in stages.items()}
    if POSE in busy:
        busy["masks"] = busy.get("masks", 0.0) + busy.pop(POSE)
    return busy


def processor_times(frames: int, processor_s: float, alone: Alone) -> ProcessorTimes:
    """Return the processor time per frame of a run of ``frames`` frames, and of its parts alone."""
    return ProcessorTimes(
        1e3 * processor_s / frames,
        decode=1e3 * alone.decode_s / alone.decoded,
        resize=1e3 * alone.resize_s / alone.frames,
        engine=1e3 * alone.engine_s / alone.frames,
        encode=1e3 * alone.encode_s / alone.frames,
    )


def name_bottleneck(busy: Mapping[str, float], *, captured_fps: float, paced: bool) -> str:
    """Return what limits the speed, in one sentence.

    Args:
        busy: share of the time that each stage works, 0..1.
        captured_fps: frames captured per second.
        paced: whether frames arrive at the source's own pace.
    """
    if not busy:
        return "nothing was processed"
    name, most = max(busy.items(), key=lambda item: item[1])
    others = [other for other, share in busy.items() if share >= BUSY and other != name]
    if others:
        names = " and ".join((*others, name))
        return (
            f"{names} are each busy for more than {BUSY:.0%} of the time; together they limit the "
            "speed"
        )
    if most >= BUSY:
        rest = max((share for other, share in busy.items() if other != name), default=0.0)
        return (
            f"{name} is busy {most:.0%} of the time; every other stage waits for it, none of them "
            f"busy for more than {rest:.0%}"
        )
    if paced:
        return (
            f"the source: it delivers {captured_fps:.1f} frames/s, and no stage is busy for more "
            f"than {most:.0%} of the time ({name})"
        )
    return (
        f"no stage alone: {name}, the busiest, works {most:.0%} of the time; the stages wait for "
        "one another or for a processor"
    )


def report_table(report: Report, width: int = 80) -> Group:
    """Format a report for a terminal of ``width`` columns: a row per stage, totals below."""
    narrow = width < WIDE
    table = Table(
        title=f"{report.frames} frames in {report.wall_s:.1f} s; milliseconds per frame",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("stage", no_wrap=True)
    ranks = ("p50", "p95") if narrow else ("p50", "p95", "p99")
    for column in (*_headings("work", ranks), "busy", *_headings("wait", ranks), "share"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, stage in report.stages.items():
        table.add_row(
            name,
            *_cells(stage, ranks),
            f"{stage.busy:.0%}",
            *(_cells(stage.wait, ranks) if stage.wait is not None else [""] * len(ranks)),
            "" if name == RECORD else f"{stage.share:.0%}",
        )
    latency, rates = report.latency_ms, report.rates
    lost = ", ".join(
        f"{count} {reason} before {stage}"
        for stage, reasons in report.drops.items()
        for reason, count in reasons.items()
    )
    return Group(
        table,
        f"{report.fps:.1f} frames/s, {report.fps / report.engine_fps:.0%} of the bare engine's "
        f"{report.engine_fps:.1f}",
        *_processor_lines(report),
        f"captured {report.captured}, processed {report.processed}, dropped {report.dropped}"
        + (f" ({lost})" if lost else ""),
        f"per second: captured {rates.captured:.1f}, processed {rates.processed:.1f}, "
        f"dropped {rates.dropped:.1f}",
        f"decode to publication: p50 {latency.p50:.1f} ms, p95 {latency.p95:.1f} ms, "
        f"p99 {latency.p99:.1f} ms",
        f"memory: {report.rss_bytes / 1e6:.0f} MB, peak {report.peak_bytes / 1e6:.0f} MB, "
        "including the model",
        f"decoding: {report.decoding.sentence()}",
        f"bottleneck: {report.bottleneck}",
    )


def _processor_lines(report: Report) -> Iterator[str]:
    spent = report.processor_ms
    if spent is not None and report.overhead is not None:
        overhead = f"{100 * report.overhead:.1f} %"
        yield f"processor time per frame: {spent.run:.1f} ms, overhead {overhead}"
        yield (
            f"  alone: decode {spent.decode:.2f}, resize {spent.resize:.2f}, "
            f"engine {spent.engine:.2f}, encode {spent.encode:.2f} ms"
        )


def _stage_reports(stages: Mapping[str, StageStats]) -> dict[str, StageReport]:
    times = {
        name: (_times(stage.work), None if stage.wait is None else _times(stage.wait))
        for name, stage in stages.items()
    }
    spent_ms = {
        name: work.mean_ms + (wait.mean_ms if wait is not None else 0.0)
        for name, (work, wait) in times.items()
        if name != RECORD
    }
    whole_ms = sum(spent_ms.values()) or 1.0
    return {
        name: StageReport(
            **msgspec.structs.asdict(work),
            busy=stages[name].busy,
            wait=wait,
            share=spent_ms.get(name, 0.0) / whole_ms,
        )
        for name, (work, wait) in times.items()
    }


def _times(durations: Distribution) -> Times:
    return Times(*(durations.percentiles_ms or (0.0, 0.0, 0.0)), mean_ms=durations.mean_ms)


def _headings(kind: str, ranks: Sequence[str]) -> list[str]:
    return [f"{kind}\n{ranks[0]}", *(f"\n{rank}" for rank in ranks[1:])]


def _cells(times: Times, ranks: Sequence[str]) -> list[str]:
    """Format times: two decimals below 10 ms, one above."""
    shown = [getattr(times, f"{rank}_ms") for rank in ranks]
    return [f"{ms:.2f}" if ms < 10 else f"{ms:.1f}" for ms in shown]
