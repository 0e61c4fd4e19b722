"""Stats: how many frames went where, how fast, and how old they were."""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from engines.instances import Instances
from pipeline.frame import STAGES, Frame
from pipeline.source_state import SourceState, StateChange

WINDOW_FRAMES = 4096
"""Percentiles are over so many of the last frames."""

RATE_WINDOW_S = 5.0
"""Frames per second are over so many of the last seconds."""

RECORD = "record"
"""Where the time goes that recorders take, after the message is out."""


class Percentiles(NamedTuple):
    """Milliseconds that 50, 95 and 99 of 100 frames do not exceed."""

    p50: float
    p95: float
    p99: float


@dataclass(frozen=True, slots=True)
class StageStats:
    """What a stage did.

    Attributes:
        frame_ms: its work on one frame, waiting excluded; a batch's work counts for each of its
            frames.
        busy: share of the wall time that it worked, 0..1; several decoders add up.
    """

    frame_ms: Percentiles
    busy: float


@dataclass(frozen=True, slots=True)
class SourceStats:
    """What became of a source's frames.

    Attributes:
        name: the source's name.
        captured: frames read.
        processed: frames published.
        dropped: frames lost on the way, by stage (in whose inbox they were) and reason.
        corrupt: damaged packets or images that were skipped.
        fps: frames published per second, lately; over its whole life once it has ended.
        latency_ms: from capture to publication, lately; None before the first frame.
        frame_count: how many frames the source has, None where unknown or endless.
        ended: why it ended, None while it runs.
        state: what it is doing.
        detail: why it is in this state, one line without credentials; "" where it needs none.
        reconnects: how often it has come back after it was reconnecting.
        last: what was seen in its last frame.
    """

    name: str
    captured: int
    processed: int
    dropped: Mapping[tuple[str, str], int]
    corrupt: int
    fps: float
    latency_ms: Percentiles | None
    frame_count: int | None
    ended: str | None
    state: SourceState
    detail: str
    reconnects: int
    last: Instances | None = field(repr=False)


@dataclass(frozen=True, slots=True)
class Stats:
    """A pipeline at one moment.

    Attributes:
        wall_s: from the first frame's capture to the last one's publication.
        sources: one for each source, in the configuration's order.
        stages: by name, in the order that a frame passes them; only those that worked.
        latency_ms: from capture to publication, over all sources.
        subscribers: how many listen.
    """

    wall_s: float
    sources: tuple[SourceStats, ...]
    stages: Mapping[str, StageStats]
    latency_ms: Percentiles | None
    subscribers: int

    @property
    def captured(self) -> int:
        """Frames read, of all sources."""
        return sum(source.captured for source in self.sources)

    @property
    def processed(self) -> int:
        """Frames published, of all sources."""
        return sum(source.processed for source in self.sources)

    @property
    def dropped(self) -> Counter[tuple[str, str]]:
        """Frames lost on the way, by stage and reason, of all sources."""
        total: Counter[tuple[str, str]] = Counter()
        for source in self.sources:
            total.update(source.dropped)
        return total

    @property
    def fps(self) -> float:
        """Frames published per second, over the whole time."""
        return self.processed / self.wall_s if self.wall_s else 0.0


@dataclass(slots=True)
class _SourceMeter:
    captured: int = 0
    processed: int = 0
    dropped: Counter[tuple[str, str]] = field(default_factory=Counter)
    corrupt: int = 0
    frame_count: int | None = None
    ended: str | None = None
    state: SourceState = SourceState.CONNECTING
    detail: str = ""
    reconnects: int = 0
    last: Instances | None = None
    first_ns: int = 0
    published_ns: deque[int] = field(default_factory=lambda: deque(maxlen=WINDOW_FRAMES))
    latency_ns: deque[int] = field(default_factory=lambda: deque(maxlen=WINDOW_FRAMES))


class Meter:
    """Reads frames' timelines as they leave the pipeline and adds them up. Thread-safe."""

    def __init__(self, sources: Sequence[str]) -> None:
        self._lock = threading.Lock()
        self._sources = {name: _SourceMeter() for name in sources}
        self._work_ns = {stage: deque[int](maxlen=WINDOW_FRAMES) for stage in (*STAGES, RECORD)}
        self._busy_ns: Counter[str] = Counter()
        self._last_start_ns: dict[str, int] = {}
        self._first_ns: int | None = None
        self._last_ns = 0
        self.subscribers = 0

    def captured(self, frame: Frame, corrupt: int) -> None:
        """Count a frame that was read; ``corrupt`` is the source's total of damaged packets."""
        with self._lock:
            source = self._sources[frame.source]
            source.captured += 1
            source.corrupt = corrupt
            if self._first_ns is None:
                self._first_ns = frame.timeline.start_ns["decode"]

    def dropped(self, frame: Frame, stage: str, reason: str) -> None:
        """Count a frame that was lost in a stage's inbox."""
        with self._lock:
            self._sources[frame.source].dropped[stage, reason] += 1
            self._add_up(frame)

    def processed(self, frame: Frame, instances: Instances) -> None:
        """Count a frame that was published."""
        timeline = frame.timeline
        published_ns = timeline.end_ns["publish"]
        with self._lock:
            source = self._sources[frame.source]
            source.processed += 1
            source.last = instances
            source.first_ns = source.first_ns or published_ns
            source.published_ns.append(published_ns)
            source.latency_ns.append(published_ns - timeline.start_ns["decode"])
            self._last_ns = published_ns
            for stage, end_ns in timeline.end_ns.items():
                self._work_ns[stage].append(end_ns - timeline.start_ns[stage])
            self._add_up(frame)

    def opened(self, name: str, frame_count: int | None) -> None:
        """Note how many frames a source will have."""
        with self._lock:
            self._sources[name].frame_count = frame_count

    def changed(self, name: str, change: StateChange) -> None:
        """Note what a source is doing now; ``ended`` tells of its end."""
        with self._lock:
            source = self._sources[name]
            source.state, source.detail = change.state, change.reason
            source.reconnects = change.reconnects

    def ended(self, name: str, why: str, corrupt: int) -> None:
        """Note that a source has ended."""
        with self._lock:
            source = self._sources[name]
            source.ended, source.corrupt = why, corrupt
            source.state, source.detail = SourceState.ENDED, why

    def drops(self, name: str) -> dict[str, dict[str, int]]:
        """Return a source's dropped frames by stage, then reason."""
        by_stage: dict[str, dict[str, int]] = {}
        with self._lock:
            for (stage, reason), count in self._sources[name].dropped.items():
                by_stage.setdefault(stage, {})[reason] = count
        return by_stage

    def stats(self) -> Stats:
        """Return the figures of this moment."""
        with self._lock:
            wall_ns = max(0, self._last_ns - (self._first_ns or 0))
            latencies = [ns for meter in self._sources.values() for ns in meter.latency_ns]
            return Stats(
                wall_s=wall_ns / 1e9,
                sources=tuple(_source_stats(name, meter) for name, meter in self._sources.items()),
                stages={
                    stage: StageStats(_percentiles(work_ns), self._busy_ns[stage] / max(1, wall_ns))
                    for stage, work_ns in self._work_ns.items()
                    if work_ns
                },
                latency_ms=_percentiles(latencies) if latencies else None,
                subscribers=self.subscribers,
            )

    def _add_up(self, frame: Frame) -> None:
        timeline = frame.timeline
        for stage, end_ns in timeline.end_ns.items():
            start_ns = timeline.start_ns[stage]
            if self._last_start_ns.get(stage) != start_ns:  # a batch worked once for all its frames
                self._last_start_ns[stage] = start_ns
                self._busy_ns[stage] += end_ns - start_ns


def _source_stats(name: str, meter: _SourceMeter) -> SourceStats:
    return SourceStats(
        name=name,
        captured=meter.captured,
        processed=meter.processed,
        dropped=dict(meter.dropped),
        corrupt=meter.corrupt,
        fps=_rate(meter),
        latency_ms=_percentiles(meter.latency_ns) if meter.latency_ns else None,
        frame_count=meter.frame_count,
        ended=meter.ended,
        state=meter.state,
        detail=meter.detail,
        reconnects=meter.reconnects,
        last=meter.last,
    )


def _rate(meter: _SourceMeter) -> float:
    times_ns = meter.published_ns
    if len(times_ns) < 2:
        return 0.0
    if meter.ended is not None:
        return (meter.processed - 1) / (times_ns[-1] - meter.first_ns) * 1e9
    now_ns = time.monotonic_ns()
    begin_ns = max(now_ns - int(RATE_WINDOW_S * 1e9), times_ns[0])
    return sum(ns > begin_ns for ns in times_ns) / max(1, now_ns - begin_ns) * 1e9


def _percentiles(durations_ns: Sequence[int] | deque[int]) -> Percentiles:
    p50, p95, p99 = np.percentile(np.asarray(durations_ns, np.float64) / 1e6, [50, 95, 99])
    return Percentiles(float(p50), float(p95), float(p99))
