"""Stats: counts of frames, rates and latencies, per source and per stage."""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise, takewhile
from typing import Protocol

from maskcast.engines.instances.instances import Instances
from maskcast.pipeline.durations import Distribution, Durations, Percentiles, percentiles_ms
from maskcast.pipeline.frame import STEPS, Frame
from maskcast.pipeline.sources.state import FINISHED, SourceState, StateChange
from maskcast.pipeline.tracking.analysis import UNTRACKED, Analysis

RATE_WINDOW_S = 5.0
"""Window of the frame rate, seconds."""

RECORD = "record"
"""The stage behind ``publish``, which only runs with outputs: files and ``on_frame``."""

_RATE_WINDOW_FRAMES = 512
"""Maximum window of the frame rate, frames; fast sources reach it before ``RATE_WINDOW_S``."""


@dataclass(frozen=True, slots=True)
class StageStats:
    """A stage's times.

    Attributes:
        work: work on each published frame, waiting excluded; a batch's work counts for each of its
            frames.
        wait: time that published frames waited for the stage, from the end of the work before.
            None for the first stage.
        busy_s: seconds of work, also on frames that were dropped later. A batch counts once; the
            times of several decoders are added up.
        busy: ``busy_s`` as a share of the wall time, 0..1, for ``decode`` 0..number of decoders.
    """

    work: Distribution
    wait: Distribution | None
    busy_s: float
    busy: float

    @property
    def frame_ms(self) -> Percentiles:
        """Percentiles of the recent work on one frame; 0 before the first frame."""
        return self.work.percentiles_ms or Percentiles(0.0, 0.0, 0.0)


@dataclass(frozen=True, slots=True)
class SourceStats:
    """A source's counts and state.

    ``captured`` is the sum of ``processed``, ``skipped``, ``dropped`` and the frames in progress.

    Attributes:
        name: the source's name.
        captured: frames read.
        processed: frames published.
        skipped: frames that the configuration leaves out, by reason: ``every_nth``, ``max_fps``.
        dropped: frames lost, by stage (in whose inbox they waited) and reason.
        corrupt: damaged packets or images that were ignored.
        fps: frames published per second over the last ``RATE_WINDOW_S``; for a source that has
            ended, over its whole run.
        latency: from the start of decoding to publication, by a monotonic clock. The ``age_ms`` of
            a message counts from the frame's capture, which may be earlier and by another clock.
        frame_count: number of frames of the source; None if unknown or endless.
        ended: why it ended; None while it runs, and while its last frames are in progress.
        state: what it is doing.
        detail: the reason for the state, one line without credentials; "" if there is none.
        reconnects: number of times it was reconnected.
        last: the instances in its last frame.
        zones: instances in each of its zones.
        lines: crossings of each of its lines, by direction.
        unrecorded: published frames that are missing in an output, by reason: ``replaced`` (the
            record stage was behind a live source) or ``failed`` (the output could not be written).
        decoder: what decoded its last frame: ``software``, ``cuda`` or ``vaapi``; "" before the
            first one.
    """

    name: str
    captured: int
    processed: int
    skipped: Mapping[str, int]
    dropped: Mapping[tuple[str, str], int]
    corrupt: int
    fps: float
    latency: Distribution
    frame_count: int | None
    ended: str | None
    state: SourceState
    detail: str
    reconnects: int
    last: Instances | None = field(repr=False)
    zones: Mapping[str, int] = field(default_factory=dict)
    lines: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    unrecorded: Mapping[str, int] = field(default_factory=dict)
    decoder: str = ""

    @property
    def latency_ms(self) -> Percentiles | None:
        """Percentiles of the recent ``latency``; None before the first frame."""
        return self.latency.percentiles_ms


@dataclass(frozen=True, slots=True)
class Stats:
    """A pipeline at one moment.

    Attributes:
        wall_s: seconds from the start of the first frame to the publication of the last one.
        sources: the sources in the order in which they were added; removed ones are absent.
        stages: by name, in the order that a frame passes them; only those that have done work.
            ``pose`` is part of the stage ``masks`` and has times of its own.
        subscribers: number of subscribers of the source that has the most.
        queue_depth: number of frames that wait before each stage, by the stage's name.
        at_work_s: seconds since each stage began its current work; idle ones are absent.
        outputs: by name, why an output is not written at the moment; "" if it is written.
        subscribers_cut_off: connections closed because the peer sent a message that was too long
            or malformed, since the start.
    """

    wall_s: float
    sources: tuple[SourceStats, ...]
    stages: Mapping[str, StageStats]
    subscribers: int
    queue_depth: Mapping[str, int]
    at_work_s: Mapping[str, float]
    outputs: Mapping[str, str] = field(default_factory=dict)
    subscribers_cut_off: int = 0

    @property
    def latency_ms(self) -> Percentiles | None:
        """Percentiles of the recent latency of all sources; None before the first frame."""
        return percentiles_ms(source.latency for source in self.sources)

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
        """Frames lost, by stage and reason, of all sources."""
        total: Counter[tuple[str, str]] = Counter()
        for source in self.sources:
            total.update(source.dropped)
        return total

    @property
    def fps(self) -> float:
        """Frames published per second, over the whole run."""
        return self.processed / self.wall_s if self.wall_s else 0.0


class Witness(Protocol):
    """Receives every frame that is published or dropped, under the meter's lock."""

    def published(self, frame: Frame, seq: int) -> None:
        """Note a published frame; ``seq`` counts the published frames of its source from 0."""

    def dropped(self, frame: Frame, stage: str, reason: str) -> None:
        """Note a frame that was lost in a stage's inbox."""


@dataclass(slots=True)
class _SourceMeter:
    captured: int = 0
    processed: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    dropped: Counter[tuple[str, str]] = field(default_factory=Counter)
    corrupt: int = 0
    frame_count: int | None = None
    ended: str | None = None
    state: SourceState = SourceState.CONNECTING
    detail: str = ""
    reconnects: int = 0
    last: Instances | None = None
    analysis: Analysis = UNTRACKED
    unrecorded: Counter[str] = field(default_factory=Counter)
    decoder: str = ""
    first_ns: int = 0
    published_ns: deque[int] = field(default_factory=lambda: deque(maxlen=_RATE_WINDOW_FRAMES))
    latency: Durations = field(default_factory=Durations)


class Meter:
    """Counts frames and adds up their timelines. Thread-safe.

    Sources may be added and removed while their frames are in progress: frames of an unknown source
    count for the stages only.

    Args:
        sources: names of the first sources.
        witness: receives every frame that is published or dropped.
    """

    def __init__(self, sources: Sequence[str], witness: Witness | None = None) -> None:
        self._lock = threading.Lock()
        self._sources = {name: _SourceMeter() for name in sources}
        self._witness = witness
        self._work = {stage: Durations() for stage in (*STEPS, RECORD)}
        self._wait = {stage: Durations() for stage in (*STEPS[1:], RECORD)}
        self._outputs: dict[str, str] = {}
        self._busy_ns: Counter[str] = Counter()
        self._last_start_ns: dict[str, int] = {}
        self._first_ns: int | None = None
        self._last_ns = 0
        self.subscribers = 0
        self.subscribers_cut_off = 0

    def add(self, name: str) -> None:
        """Count for one more source, from 0, also if there was one of that name."""
        with self._lock:
            self._sources[name] = _SourceMeter()

    def remove(self, name: str) -> None:
        """Forget a source and its figures."""
        with self._lock:
            self._sources.pop(name, None)

    def captured(self, frame: Frame, corrupt: int) -> None:
        """Count a frame that was read; ``corrupt`` is the source's total of damaged packets."""
        with self._lock:
            if self._first_ns is None:
                self._first_ns = frame.timeline.start_ns["decode"]
            if (source := self._sources.get(frame.source)) is not None:
                source.captured += 1
                source.corrupt, source.decoder = corrupt, frame.decoder

    def skipped(self, frame: Frame, reason: str) -> None:
        """Count a frame that the configuration leaves out."""
        with self._lock:
            if (source := self._sources.get(frame.source)) is not None:
                source.skipped[reason] += 1
            self._add_up(frame)

    def dropped(self, frame: Frame, stage: str, reason: str) -> None:
        """Count a frame that was lost in a stage's inbox."""
        with self._lock:
            if (source := self._sources.get(frame.source)) is not None:
                source.dropped[stage, reason] += 1
            self._add_up(frame)
            if self._witness is not None:
                self._witness.dropped(frame, stage, reason)

    def processed(self, frame: Frame, instances: Instances, analysis: Analysis = UNTRACKED) -> None:
        """Count a frame that was published."""
        start_ns, end_ns = frame.timeline.start_ns, frame.timeline.end_ns
        published_ns = end_ns["publish"]
        with self._lock:
            self._last_ns = published_ns
            for stage, ended_ns in end_ns.items():
                self._work[stage].add(ended_ns - start_ns[stage])
            for before, stage in pairwise(step for step in STEPS if step in end_ns):
                self._wait[stage].add(start_ns[stage] - end_ns[before])
            self._add_up(frame)
            seq = 0
            if (source := self._sources.get(frame.source)) is not None:
                seq = source.processed
                source.processed += 1
                source.last, source.analysis = instances, analysis
                source.first_ns = source.first_ns or published_ns
                source.published_ns.append(published_ns)
                source.latency.add(published_ns - start_ns["decode"])
            if self._witness is not None:
                self._witness.published(frame, seq)

    def recorded(self, frame: Frame) -> None:
        """Count the record stage's work on a frame that was published before."""
        start_ns, end_ns = frame.timeline.start_ns, frame.timeline.end_ns
        with self._lock:
            self._work[RECORD].add(end_ns[RECORD] - start_ns[RECORD])
            self._wait[RECORD].add(start_ns[RECORD] - end_ns["publish"])
            self._busy_ns[RECORD] += end_ns[RECORD] - start_ns[RECORD]

    def unrecorded(self, frame: Frame, reason: str) -> None:
        """Count a published frame that is missing in an output."""
        with self._lock:
            if (source := self._sources.get(frame.source)) is not None:
                source.unrecorded[reason] += 1

    def output(self, name: str, problem: str = "") -> None:
        """Note why an output is not written at the moment; "" if it is written."""
        with self._lock:
            self._outputs[name] = problem

    def opened(self, name: str, frame_count: int | None) -> None:
        """Note the number of frames of a source."""
        with self._lock:
            if (source := self._sources.get(name)) is not None:
                source.frame_count = frame_count

    def changed(self, name: str, change: StateChange) -> None:
        """Note a source's new state; ``ended`` notes its end."""
        with self._lock:
            if (source := self._sources.get(name)) is not None:
                source.state, source.detail = change.state, change.reason
                source.reconnects = change.reconnects

    def ended(self, name: str, reason: str, corrupt: int) -> None:
        """Note that a source has ended."""
        with self._lock:
            if (source := self._sources.get(name)) is not None:
                source.ended, source.corrupt = reason, corrupt
                source.state, source.detail = SourceState.ENDED, reason

    def drops(self, name: str) -> dict[str, dict[str, int]]:
        """Return a source's dropped frames by stage, then reason; {} for an unknown source."""
        by_stage: dict[str, dict[str, int]] = {}
        with self._lock:
            if (source := self._sources.get(name)) is not None:
                for (stage, reason), count in source.dropped.items():
                    by_stage.setdefault(stage, {})[reason] = count
        return by_stage

    def stats(
        self,
        queue_depth: Mapping[str, int] | None = None,
        at_work_s: Mapping[str, float] | None = None,
    ) -> Stats:
        """Return the current figures; the arguments become fields of the result."""
        with self._lock:
            wall_ns = max(0, self._last_ns - (self._first_ns or 0))
            return Stats(
                wall_s=wall_ns / 1e9,
                sources=tuple(_source_stats(name, meter) for name, meter in self._sources.items()),
                stages={
                    stage: StageStats(
                        work.distribution(),
                        self._wait[stage].distribution() if stage in self._wait else None,
                        self._busy_ns[stage] / 1e9,
                        self._busy_ns[stage] / max(1, wall_ns),
                    )
                    for stage, work in self._work.items()
                    if self._busy_ns[stage]
                },
                subscribers=self.subscribers,
                subscribers_cut_off=self.subscribers_cut_off,
                queue_depth=queue_depth or {},
                at_work_s=at_work_s or {},
                outputs=dict(self._outputs),
            )

    def _add_up(self, frame: Frame) -> None:
        timeline = frame.timeline
        for stage, end_ns in timeline.end_ns.items():
            start_ns = timeline.start_ns[stage]
            if self._last_start_ns.get(stage) != start_ns:  # a batch counts once
                self._last_start_ns[stage] = start_ns
                self._busy_ns[stage] += end_ns - start_ns


def _source_stats(name: str, meter: _SourceMeter) -> SourceStats:
    finished = meter.processed + meter.skipped.total() + meter.dropped.total()
    is_finishing = meter.ended in FINISHED and meter.captured > finished
    return SourceStats(
        name=name,
        captured=meter.captured,
        processed=meter.processed,
        skipped=dict(meter.skipped),
        dropped=dict(meter.dropped),
        corrupt=meter.corrupt,
        fps=_rate(meter),
        latency=meter.latency.distribution(),
        frame_count=meter.frame_count,
        ended=None if is_finishing else meter.ended,
        state=SourceState.STREAMING if is_finishing else meter.state,
        detail="" if is_finishing else meter.detail,
        reconnects=meter.reconnects,
        last=meter.last,
        zones=meter.analysis.zones,
        lines=meter.analysis.lines,
        unrecorded=dict(meter.unrecorded),
        decoder=meter.decoder,
    )


def _rate(meter: _SourceMeter) -> float:
    times_ns = meter.published_ns
    if len(times_ns) < 2:
        return 0.0
    if meter.ended is not None:
        return (meter.processed - 1) / max(1, times_ns[-1] - meter.first_ns) * 1e9
    now_ns = time.monotonic_ns()
    begin_ns = max(now_ns - int(RATE_WINDOW_S * 1e9), times_ns[0])
    recent = sum(1 for _ in takewhile(lambda ns: ns > begin_ns, reversed(times_ns)))
    return recent / max(1, now_ns - begin_ns) * 1e9
