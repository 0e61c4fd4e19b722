"""``maskcast watch``: shows what a publisher sends."""

from __future__ import annotations

import sys
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import msgspec

from maskcast.engines.instances.instances import Instances
from maskcast.pipeline.cli.live_table import LiveTable
from maskcast.pipeline.outputs.jsonl import FrameRecord, instance_records, label_name
from maskcast.pipeline.subscriber.received import PublishedFrame, StreamEvent
from maskcast.pipeline.subscriber.subscription import Subscription

RATE_WINDOW_S = 3.0
"""Window of the frame rate, seconds."""


class EventRecord(msgspec.Struct, frozen=True):
    """An event as a line of JSON; ``time_ns`` is when it happened, UTC nanoseconds."""

    source: str
    event: str
    time_ns: int
    data: dict[str, Any]


def print_json(
    subscription: Subscription[PublishedFrame] | Subscription[PublishedFrame | StreamEvent],
    limit: int | None,
) -> None:
    """Print each frame or event as a line of JSON as soon as it arrives.

    Args:
        subscription: what to print.
        limit: maximum number of frames; None for all.
    """
    frames = 0
    for item in subscription:
        record = event_record(item) if isinstance(item, StreamEvent) else frame_record(item)
        sys.stdout.buffer.write(msgspec.json.encode(record) + b"\n")
        sys.stdout.buffer.flush()
        frames += isinstance(item, PublishedFrame)
        if frames == limit:
            return


def event_record(event: StreamEvent) -> EventRecord:
    """Convert a received event to a record.

    Its time is the capture time of the frame for events of tracks, and the sending time for others.
    """
    time_ns = event.data.get("capture_ns", event.publish_ns)
    return EventRecord(event.source, event.name, time_ns, event.data)


def frame_record(frame: PublishedFrame) -> FrameRecord:
    """Convert a received frame to the record that ``run --jsonl`` writes too."""
    return FrameRecord(
        source=frame.source,
        seq=frame.seq,
        pts_s=frame.pts_s,
        capture_ns=frame.capture_ns,
        age_ms=round(frame.age_ms, 3),
        dropped_before=frame.dropped_before,
        lost_before=frame.lost_before,
        width=frame.instances.width,
        height=frame.instances.height,
        instances=instance_records(frame.instances, frame.label_names, frame.keypoints),
        zones=frame.zones or msgspec.UNSET,
        lines=frame.lines or msgspec.UNSET,
    )


@dataclass(slots=True)
class _Seen:
    """Figures of one source."""

    frames: int = 0
    lost: int = 0
    arrivals_s: deque[float] = field(default_factory=deque)
    last: PublishedFrame | None = None

    def add(self, frame: PublishedFrame) -> None:
        now_s = time.monotonic()
        self.frames += 1
        self.lost += frame.lost_before
        self.last = frame
        self.arrivals_s.append(now_s)
        while self.arrivals_s[0] < now_s - RATE_WINDOW_S:
            self.arrivals_s.popleft()

    def row(self, source: str) -> list[str]:
        assert self.last is not None
        span_s = self.arrivals_s[-1] - self.arrivals_s[0]
        rate = f"{(len(self.arrivals_s) - 1) / span_s:.1f}" if span_s > 0 else ""
        return [
            source,
            str(self.frames),
            str(self.lost),
            rate,
            f"{self.last.age_ms:.0f}",
            name_instances(self.last.instances, self.last.label_names),
        ]


def count_labels(labels: list[int], label_names: tuple[str, ...]) -> str:
    """Count labels by name: ``person 3, dog 1``, the most frequent first."""
    return count_names([label_name(label, label_names) for label in labels])


def count_names(names: list[str]) -> str:
    """Count names: ``person 3, dog 1``, the most frequent first."""
    return ", ".join(f"{name} {count}" for name, count in Counter(names).most_common())


def name_instances(instances: Instances, label_names: tuple[str, ...]) -> str:
    """Describe the instances, with track ids if there are any: ``person 3 #4 #7, dog 1``."""
    labels = instances.labels.tolist()
    if instances.track_ids is None:
        return count_labels(labels, label_names)
    ids: dict[int, list[str]] = {}
    for label, track_id in zip(labels, instances.track_ids.tolist(), strict=True):
        ids.setdefault(label, []).extend([f"#{track_id}"] if track_id else [])
    return ", ".join(
        " ".join([label_name(label, label_names), str(count), *sorted(ids[label], key=_number)])
        for label, count in Counter(labels).most_common()
    )


def _number(track_id: str) -> int:
    return int(track_id[1:])


def show_table(
    subscription: Subscription[PublishedFrame], endpoint: str, limit: int | None
) -> None:
    """Show a live table with a row for each source."""
    seen: dict[str, _Seen] = {}
    columns = ("source", "frames", "lost", "fps", "age ms", "instances")
    next_show_s = 0.0
    with LiveTable(f"watching {endpoint}", columns) as table:
        try:
            for frame in islice(subscription, limit):
                seen.setdefault(frame.source, _Seen()).add(frame)
                if time.monotonic() >= next_show_s:
                    next_show_s = time.monotonic() + 0.2
                    table.show([figures.row(name) for name, figures in seen.items()])
        finally:
            table.show([figures.row(name) for name, figures in seen.items()])
