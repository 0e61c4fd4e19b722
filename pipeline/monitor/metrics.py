"""Metrics: a pipeline's figures as Prometheus metrics."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple, TypeVar

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.metrics_core import CounterMetricFamily as Counter
from prometheus_client.metrics_core import GaugeMetricFamily as Gauge
from prometheus_client.metrics_core import HistogramMetricFamily as Histogram
from prometheus_client.metrics_core import InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from maskcast.engines.engine import Engine
from maskcast.engines.memory import read_memory
from maskcast.pipeline.configuration.config import DECODE_DEVICES
from maskcast.pipeline.durations import BOUNDS_S, Distribution
from maskcast.pipeline.frame import STAGES
from maskcast.pipeline.sources.state import SourceState
from maskcast.pipeline.stats import RECORD, SourceStats, StageStats, Stats

_ORDINARY_DROP = ("preprocess", "replaced")
"""Reported from the start, as 0: a rate needs a first value."""

_DECODERS = ("software", *DECODE_DEVICES)

_BUCKETS = (*(str(bound_s) for bound_s in BOUNDS_S), "+Inf")
_NOTHING = Distribution()


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


_Labels = tuple[str, ...]
_Samples = float | Distribution | Mapping[Any, float]
"""A value, or values by their further labels (tuples of texts)."""

T = TypeVar("T")
_Family = tuple[Callable[..., Metric], str, _Labels, Callable[[T], _Samples], str]
"""A metric: its kind, name, further labels, the function that reads it, and its help text."""


class _Stage(NamedTuple):
    stats: StageStats
    queue_depth: float
    at_work_s: float


def _dropped(source: SourceStats) -> _Samples:
    unrecorded = {(RECORD, reason): count for reason, count in source.unrecorded.items()}
    return {_ORDINARY_DROP: 0, **source.dropped, **unrecorded}


def _crossings(source: SourceStats) -> _Samples:
    return {
        (line, direction): count
        for line, directions in source.lines.items()
        for direction, count in directions.items()
    }


def _by_name(values: Mapping[str, float]) -> _Samples:
    return {(name,): value for name, value in values.items()}


# fmt: off
_SOURCE_FAMILIES: tuple[_Family[SourceStats], ...] = (
    (Counter, "maskcast_frames_captured", (), lambda source: source.captured,
     "Frames read."),
    (Counter, "maskcast_frames_processed", (), lambda source: source.processed,
     "Frames published."),
    (Counter, "maskcast_frames_skipped", ("reason",), lambda source: _by_name(source.skipped),
     "Frames that the configuration leaves out, by reason."),
    (Counter, "maskcast_frames_dropped", ("stage", "reason"), _dropped,
     "Frames lost before a stage, by reason; those before record were published."),
    (Counter, "maskcast_source_corrupt_packets", (), lambda source: source.corrupt,
     "Damaged packets or images that were ignored."),
    (Counter, "maskcast_source_reconnects", (), lambda source: source.reconnects,
     "Number of times a source was reconnected."),
    (Gauge, "maskcast_source_state", ("state",),
     lambda source: _by_name({state: source.state is state for state in SourceState}),
     "1 for the current state, 0 for the others."),
    (Gauge, "maskcast_source_decoder", ("decoder",),
     lambda source: _by_name({name: source.decoder == name for name in _DECODERS}),
     "1 for the decoder of the source, 0 for the others."),
    (Histogram, "maskcast_latency_seconds", (), lambda source: source.latency,
     "From the start of decoding to publication."),
    (Gauge, "maskcast_zone_instances", ("zone",), lambda source: _by_name(source.zones),
     "Instances in a zone now."),
    (Counter, "maskcast_line_crossings", ("line", "direction"), _crossings,
     "Instances that crossed a line, by direction."),
)
_STAGE_FAMILIES: tuple[_Family[_Stage], ...] = (
    (Histogram, "maskcast_stage_work_seconds", (), lambda stage: stage.stats.work,
     "Work of a stage on a published frame."),
    (Counter, "maskcast_stage_busy_seconds", (), lambda stage: stage.stats.busy_s,
     "Time that a stage worked; its rate is the share of the time that it is busy."),
)
_INBOX_FAMILIES: tuple[_Family[_Stage], ...] = (
    (Histogram, "maskcast_stage_wait_seconds", (), lambda stage: stage.stats.wait or _NOTHING,
     "Time that a published frame waited for a stage."),
    (Gauge, "maskcast_queue_depth", (), lambda stage: stage.queue_depth,
     "Frames that wait for a stage."),
    (Gauge, "maskcast_stage_at_work_seconds", (), lambda stage: stage.at_work_s,
     "Time since a stage began its current work; 0 while it waits."),
)
_PIPELINE_FAMILIES: tuple[_Family[Stats], ...] = (
    (Gauge, "maskcast_output_failed", ("output",),
     lambda stats: _by_name({name: bool(problem) for name, problem in stats.outputs.items()}),
     "1 while an output cannot be written."),
    (Gauge, "maskcast_subscribers", (), lambda stats: stats.subscribers,
     "Subscribers of the source that has the most."),
    (Counter, "maskcast_subscribers_cut_off", (), lambda stats: stats.subscribers_cut_off,
     "Connections closed because a peer sent a message that was too long or malformed."),
    (Gauge, "maskcast_resident_memory_peak_bytes", (), lambda _: read_memory().peak_bytes,
     "Peak resident memory of the process."),
)
# fmt: on


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
        sources = [(source.name, source) for source in stats.sources]
        stages = [(name, _stage(stats, name)) for name in dict.fromkeys((*STAGES, *stats.stages))]
        yield from _collect(_SOURCE_FAMILIES, "source", sources)
        yield from _collect(_STAGE_FAMILIES, "stage", stages)
        yield from _collect(_INBOX_FAMILIES, "stage", stages[1:])  # decode has no inbox
        yield from _collect(_PIPELINE_FAMILIES, None, [("", stats)])
        yield InfoMetricFamily("maskcast_engine", "The engine that runs the model.", self._engine)
        build = {"version": _version(), "python": platform.python_version()}
        yield InfoMetricFamily("maskcast_build", "Versions of maskcast and Python.", build)


def _collect(
    families: Iterable[_Family[T]], label: str | None, entries: Sequence[tuple[str, T]]
) -> Iterator[Metric]:
    """Yield families with the samples of all entries, whose names are the values of ``label``."""
    for kind, family_name, further_labels, read, help_text in families:
        labels = further_labels if label is None else (label, *further_labels)
        family: Any = kind(family_name, help_text, labels=labels)
        for name, entry in entries:
            first = () if label is None else (name,)
            samples = read(entry)
            if isinstance(samples, Distribution):
                # Prometheus's buckets are cumulative.
                buckets = list(zip(_BUCKETS, accumulate(samples.counts), strict=True))
                family.add_metric(first, buckets, samples.sum_s)
                continue
            for rest, value in (samples if isinstance(samples, Mapping) else {(): samples}).items():
                family.add_metric((*first, *rest), value)
        yield family


def _stage(stats: Stats, name: str) -> _Stage:
    known = stats.stages.get(name) or StageStats(_NOTHING, _NOTHING, 0.0, 0.0)
    return _Stage(known, stats.queue_depth.get(name, 0), stats.at_work_s.get(name, 0.0))


def _version() -> str:
    try:
        return importlib.metadata.version("maskcast")
    except importlib.metadata.PackageNotFoundError:
        return "checkout"
