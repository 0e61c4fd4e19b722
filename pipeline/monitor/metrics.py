"""Metrics: a pipeline's figures as Prometheus metrics."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from maskcast.engines.engine import Engine
from maskcast.engines.memory import read_memory
from maskcast.pipeline.durations import BOUNDS_S, Distribution
from maskcast.pipeline.frame import STAGES
from maskcast.pipeline.sources.state import SourceState
from maskcast.pipeline.stats import RECORD, SourceStats, Stats

_ORDINARY_DROP = ("preprocess", "replaced")
"""Reported from the start, as 0: a rate needs a first value."""

_BUCKETS = (*(str(bound_s) for bound_s in BOUNDS_S), "+Inf")


def make_registry(read: Callable[[], Stats], engine: Engine) -> CollectorRegistry:
    """Return a registry for one pipeline; its figures are read at every scrape.

    The series of a removed source disappear.

    Args:
        read: returns the current figures.
        engine: the engine that runs the model.
    """
    registry = CollectorRegistry(auto_describe=False)
    registry.register(PipelineCollector(read, engine))
    ProcessCollector(registry=registry)
    return registry


class PipelineCollector(Collector):
    """Converts a pipeline's figures to metric families. Labels hold names, never URLs."""

    def __init__(self, read: Callable[[], Stats], engine: Engine) -> None:
        manifest = engine.manifest
        self._read = read
        self._engine = {
            "model": manifest.name,
            "backend": manifest.backend,
            "precision": manifest.precision,
            "device": engine.device,
        }

    def collect(self) -> Iterator[Metric]:
        """Yield every family once."""
        stats = self._read()
        yield from _source_families(stats.sources)
        yield from _stage_families(stats)
        failed = GaugeMetricFamily(
            "maskcast_output_failed", "1 while an output cannot be written.", labels=["output"]
        )
        for name, problem in stats.outputs.items():
            failed.add_metric([name], bool(problem))
        yield failed
        yield GaugeMetricFamily(
            "maskcast_subscribers",
            "Subscribers, of the source that has the most.",
            value=stats.subscribers,
        )
        yield CounterMetricFamily(
            "maskcast_subscribers_cut_off",
            "Connections closed because a peer sent a message that was too long or malformed.",
            value=stats.subscribers_cut_off,
        )
        yield GaugeMetricFamily(
            "maskcast_resident_memory_peak_bytes",
            "Peak resident memory of the process.",
            value=read_memory().peak_bytes,
        )
        yield InfoMetricFamily("maskcast_engine", "The engine that runs the model.", self._engine)
        build = {"version": _version(), "python": platform.python_version()}
        yield InfoMetricFamily("maskcast_build", "Versions of maskcast and Python.", build)


def _source_families(sources: Iterable[SourceStats]) -> Iterator[Metric]:
    captured = CounterMetricFamily("maskcast_frames_captured", "Frames read.", labels=["source"])
    processed = CounterMetricFamily(
        "maskcast_frames_processed", "Frames published.", labels=["source"]
    )
    skipped = CounterMetricFamily(
        "maskcast_frames_skipped",
        "Frames that the configuration leaves out, by reason.",
        labels=["source", "reason"],
    )
    dropped = CounterMetricFamily(
        "maskcast_frames_dropped",
        "Frames lost before a stage, by reason; those before record were published.",
        labels=["source", "stage", "reason"],
    )
    corrupt = CounterMetricFamily(
        "maskcast_source_corrupt_packets",
        "Damaged packets or images that were ignored.",
        labels=["source"],
    )
    reconnects = CounterMetricFamily(
        "maskcast_source_reconnects", "Number of times a source was reconnected.", labels=["source"]
    )
    state = GaugeMetricFamily(
        "maskcast_source_state",
        "1 for the current state, 0 for the others.",
        labels=["source", "state"],
    )
    latency = HistogramMetricFamily(
        "maskcast_latency_seconds", "From the start of decoding to publication.", labels=["source"]
    )
    zones = GaugeMetricFamily(
        "maskcast_zone_instances", "Instances in a zone now.", labels=["source", "zone"]
    )
    crossings = CounterMetricFamily(
        "maskcast_line_crossings",
        "Instances that crossed a line, by direction.",
        labels=["source", "line", "direction"],
    )
    for source in sources:
        name = [source.name]
        for zone, count in source.zones.items():
            zones.add_metric([source.name, zone], count)
        for line, directions in source.lines.items():
            for direction, count in directions.items():
                crossings.add_metric([source.name, line, direction], count)
        captured.add_metric(name, source.captured)
        processed.add_metric(name, source.processed)
        for option, count in source.skipped.items():
            skipped.add_metric([source.name, option], count)
        for reason, count in {_ORDINARY_DROP: 0, **source.dropped}.items():
            dropped.add_metric([source.name, *reason], count)
        for why, count in source.unrecorded.items():
            dropped.add_metric([source.name, RECORD, why], count)
        corrupt.add_metric(name, source.corrupt)
        reconnects.add_metric(name, source.reconnects)
        for possible in SourceState:
            state.add_metric([source.name, possible], source.state is possible)
        _add_histogram(latency, name, source.latency)
    yield from (captured, processed, skipped, dropped, corrupt, reconnects, state, latency)
    yield from (zones, crossings)


def _stage_families(stats: Stats) -> Iterator[Metric]:
    work = HistogramMetricFamily(
        "maskcast_stage_work_seconds",
        "Work of a stage on a published frame.",
        labels=["stage"],
    )
    wait = HistogramMetricFamily(
        "maskcast_stage_wait_seconds",
        "Time that a published frame waited for a stage.",
        labels=["stage"],
    )
    busy = CounterMetricFamily(
        "maskcast_stage_busy_seconds",
        "Time that a stage worked; its rate is the share of time that it is busy.",
        labels=["stage"],
    )
    depth = GaugeMetricFamily(
        "maskcast_queue_depth", "Frames that wait before a stage.", labels=["stage"]
    )
    at_work = GaugeMetricFamily(
        "maskcast_stage_at_work_seconds",
        "Time since a stage began its current work; 0 while it waits.",
        labels=["stage"],
    )
    for name in dict.fromkeys((*STAGES, *stats.stages)):
        stage = stats.stages.get(name)
        _add_histogram(work, [name], stage.work if stage else Distribution())
        busy.add_metric([name], stage.busy_s if stage else 0.0)
        if name != STAGES[0]:
            waited = stage.wait if stage else None
            _add_histogram(wait, [name], waited or Distribution())
            depth.add_metric([name], stats.queue_depth.get(name, 0))
            at_work.add_metric([name], stats.at_work_s.get(name, 0.0))
    yield from (work, wait, busy, depth, at_work)


def _add_histogram(
    family: HistogramMetricFamily, labels: list[str], durations: Distribution
) -> None:
    """Add a histogram; in Prometheus's buckets the lower ones are included."""
    buckets = list(zip(_BUCKETS, accumulate(durations.counts), strict=True))
    family.add_metric(labels, buckets, durations.sum_s)


def _version() -> str:
    try:
        return importlib.metadata.version("maskcast")
    except importlib.metadata.PackageNotFoundError:
        return "checkout"
