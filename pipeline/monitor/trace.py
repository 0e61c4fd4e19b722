"""Trace: every frame's path through the stages, as a file for Perfetto and Chrome."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec

from maskcast.pipeline.frame import POSE, STAGES, STEPS, Frame, Timeline
from maskcast.pipeline.stats import RECORD

MAX_FRAMES = 50_000
"""Number of frames that are kept, the most recent ones; about 50 MB."""

_PROCESS = 1

TraceEvent = dict[str, Any]
"""An event of Chrome's trace event format (Duman and Sinclair, "Trace Event Format")."""


@dataclass(frozen=True, slots=True)
class Passage:
    """One frame's path through the stages, after it was published or dropped.

    Attributes:
        source: the source's name.
        index: the frame's index in the source, from 0.
        seq: the number of its message, from 0; None if it was dropped.
        timeline: when each stage worked on it.
        left_ns: when it was published or dropped, ``time.monotonic_ns``.
        drop: the stage before which it was dropped, and the reason; None if it was published.
    """

    source: str
    index: int
    seq: int | None
    timeline: Timeline
    left_ns: int
    drop: tuple[str, str] | None


class Trace:
    """Keeps the timelines of the last frames. Used as a pipeline's ``witness``."""

    def __init__(self) -> None:
        self._passages: deque[Passage] = deque(maxlen=MAX_FRAMES)

    def published(self, frame: Frame, seq: int) -> None:
        """Keep a published frame."""
        left_ns = frame.timeline.end_ns["publish"]
        self._passages.append(
            Passage(frame.source, frame.index, seq, frame.timeline, left_ns, None)
        )

    def dropped(self, frame: Frame, stage: str, reason: str) -> None:
        """Keep a dropped frame."""
        left_ns = time.monotonic_ns()
        self._passages.append(
            Passage(frame.source, frame.index, None, frame.timeline, left_ns, (stage, reason))
        )

    @property
    def passages(self) -> list[Passage]:
        """The frames in the order in which they were published or dropped."""
        return list(self._passages)


def write_trace(path: Path, passages: Sequence[Passage]) -> None:
    """Write a file for https://ui.perfetto.dev or ``chrome://tracing``.

    Raises:
        OSError: the file cannot be written.
    """
    document = {"traceEvents": list(trace_events(passages)), "displayTimeUnit": "ms"}
    path.write_bytes(msgspec.json.encode(document))


def trace_events(passages: Sequence[Passage]) -> Iterator[TraceEvent]:
    """Yield a track per thread with a slice per frame, and the depth of each queue.

    Arrows connect the slices of a frame. Frames of one batch overlap in ``infer`` and ``masks``.
    Times are microseconds since the first frame's decoding began.
    """
    tracks = _tracks(passages)
    base_ns = min((passage.timeline.start_ns["decode"] for passage in passages), default=0)
    yield {"ph": "M", "pid": _PROCESS, "name": "process_name", "args": {"name": "maskcast"}}
    for name, thread in tracks.items():
        head = {"ph": "M", "pid": _PROCESS, "tid": thread}
        yield {**head, "name": "thread_name", "args": {"name": name}}
        yield {**head, "name": "thread_sort_index", "args": {"sort_index": thread}}
    for number, passage in enumerate(passages):
        yield from _frame_events(passage, number, tracks, base_ns)
    yield from _depth_events(passages, base_ns)


def _tracks(passages: Sequence[Passage]) -> dict[str, int]:
    """Return a number for each track: first the sources' decoders, then the stages."""
    sources = dict.fromkeys(passage.source for passage in passages)
    names = [*(f"decode {source}" for source in sources), *STAGES[1:]]
    if any(RECORD in passage.timeline.end_ns for passage in passages):
        names.append(RECORD)
    return {name: number for number, name in enumerate(names, 1)}


def _frame_events(
    passage: Passage, number: int, tracks: dict[str, int], base_ns: int
) -> Iterator[TraceEvent]:
    start_ns, end_ns = passage.timeline.start_ns, passage.timeline.end_ns
    stages = [stage for stage in (*STEPS, RECORD) if stage in end_ns]
    flow = {"cat": "frame", "name": "frame", "pid": _PROCESS, "id": number}
    for position, stage in enumerate(stages):
        track = tracks[_track(stage, passage.source)]
        arguments: dict[str, Any] = {"source": passage.source, "index": passage.index}
        if passage.seq is not None:
            arguments["seq"] = passage.seq
        if position:
            arguments["waited_ms"] = (start_ns[stage] - end_ns[stages[position - 1]]) / 1e6
        begin_us = (start_ns[stage] - base_ns) / 1e3
        yield {
            "ph": "X",
            "pid": _PROCESS,
            "tid": track,
            "ts": begin_us,
            "dur": (end_ns[stage] - start_ns[stage]) / 1e3,
            "name": f"{passage.source} {passage.index}",
            "cat": stage,
            "args": arguments,
        }
        if len(stages) > 1:
            phase = "s" if position == 0 else "f" if stage == stages[-1] else "t"
            yield {**flow, "ph": phase, "tid": track, "ts": begin_us, "bp": "e"}
    if passage.drop is not None:
        stage, reason = passage.drop
        yield {
            "ph": "i",
            "s": "t",
            "pid": _PROCESS,
            "tid": tracks[_track(stage, passage.source)],
            "ts": (passage.left_ns - base_ns) / 1e3,
            "name": f"dropped: {reason}",
            "cat": "drop",
            "args": {"source": passage.source, "index": passage.index, "stage": stage},
        }


def _track(stage: str, source: str) -> str:
    """Return the name of the track of a stage's thread."""
    if stage == "decode":
        return f"decode {source}"
    return "masks" if stage == POSE else stage


def _depth_events(passages: Sequence[Passage], base_ns: int) -> Iterator[TraceEvent]:
    """Yield the number of frames that wait before each stage, whenever it changes.

    A frame waits from the end of one stage's work to the start of the next one's, or until it is
    dropped. Frames that a decoder holds while the inbox is full are included.
    """
    posed = any(POSE in passage.timeline.end_ns for passage in passages)
    for before, stage in pairwise(STEPS if posed else STAGES):
        changes: Counter[int] = Counter()
        for passage in passages:
            begin_ns = passage.timeline.end_ns.get(before)
            if begin_ns is not None and (passage.drop is None or passage.drop[0] != before):
                changes[begin_ns] += 1
                changes[passage.timeline.start_ns.get(stage, passage.left_ns)] -= 1
        depth = 0
        for at_ns in sorted(changes):
            depth += changes[at_ns]
            yield {
                "ph": "C",
                "pid": _PROCESS,
                "ts": (at_ns - base_ns) / 1e3,
                "name": f"waiting for {stage}",
                "args": {"frames": depth},
            }
