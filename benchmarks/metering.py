"""Measure the cost of metering, as a share of the time per frame.

Run: ``python -m benchmarks.metering [CLIP] [--limit N] [--repeat N] [--json]``. The metering of a
frame is timed directly, on frames made before, because it is far below the variation between whole
runs: the timestamps of all stages and recorders, the counters, and the count of drops that goes
into a message, with and without a trace. Periodic work is added: the figures for the live table
five times a second, and a scrape every five seconds. Times are processor time, which other work on
the machine changes little. The time per frame is that of the pipeline with the default model, on
the clip or on a test pattern. Medians over the repeats are reported.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
from prometheus_client import generate_latest

from benchmarks.pipeline import make_clip
from maskcast.engines.instances.instances import Instances
from maskcast.engines.load import load_engine
from maskcast.pipeline.cli.profile.profile import profile
from maskcast.pipeline.frame import STAGES, Frame
from maskcast.pipeline.monitor.metrics import make_registry
from maskcast.pipeline.monitor.trace import Trace
from maskcast.pipeline.stats import RECORD, Meter

FRAMES = 5000
SOURCES = 4
TABLE_HZ = 5.0
SCRAPE_HZ = 0.2


def make_frames(count: int) -> list[Frame]:
    """Make frames without timelines, of several sources in turn."""
    decoded = av.VideoFrame(16, 16, "gray")
    return [Frame(f"cam{index % SOURCES}", index, None, 0, decoded) for index in range(count)]


def no_instances() -> Instances:
    """Make an empty result."""
    boxes, scores = np.empty((0, 4), np.float32), np.empty(0, np.float32)
    return Instances(16, 16, boxes, scores, np.empty(0, np.int32))


def per_frame_us(meter: Meter) -> float:
    """Time all metering of a frame, microseconds."""
    frames, instances = make_frames(FRAMES), no_instances()
    began_s = time.thread_time()
    for frame in frames:
        for stage in (*STAGES, RECORD):
            frame.timeline.begin(stage)
            frame.timeline.end(stage)
        meter.captured(frame, 0)
        meter.drops(frame.source)
        meter.processed(frame, instances)
    return (time.thread_time() - began_s) / FRAMES * 1e6


def call_us(function: Callable[[], object], calls: int = 50) -> float:
    """Time a call, microseconds."""
    began_s = time.thread_time()
    for _ in range(calls):
        function()
    return (time.thread_time() - began_s) / calls * 1e6


def show_table(meter: Meter) -> None:
    """Compute the figures of the live table."""
    for source in meter.stats().sources:
        assert source.latency_ms is not None


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("clip", nargs="?", type=Path)
    parser.add_argument("--limit", type=int, default=60)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()

    names = [f"cam{number}" for number in range(SOURCES)]
    engine = load_engine("default")
    bare_us, traced_us, table_us, scrape_us, frame_ms = [], [], [], [], []
    with tempfile.TemporaryDirectory() as folder:
        clip = arguments.clip or Path(folder) / "pattern.mp4"
        if arguments.clip is None:
            make_clip(clip, arguments.limit)
        for _ in range(arguments.repeat):
            meter = Meter(names)
            bare_us.append(per_frame_us(meter))
            traced_us.append(per_frame_us(Meter(names, Trace())))
            registry = make_registry(meter.stats, engine)
            table_us.append(call_us(lambda meter=meter: show_table(meter)))  # type: ignore[misc]
            scrape_us.append(
                call_us(lambda registry=registry: generate_latest(registry))  # type: ignore[misc]
            )
            frame_ms.append(1000 / profile(str(clip), engine, arguments.limit).fps)
    engine.close()
    bare, traced = statistics.median(bare_us), statistics.median(traced_us)
    periodic = (
        TABLE_HZ * statistics.median(table_us) + SCRAPE_HZ * statistics.median(scrape_us)
    ) / 1e6
    frame = statistics.median(frame_ms)
    summary = {
        "device": engine.device,
        "per_frame_us": round(bare, 1),
        "per_frame_traced_us": round(traced, 1),
        "table_us": round(statistics.median(table_us), 1),
        "scrape_us": round(statistics.median(scrape_us), 1),
        "frame_ms": round(frame, 2),
        "periodic_share": round(periodic, 5),
        "share": round(bare / 1e3 / frame + periodic, 5),
        "share_traced": round(traced / 1e3 / frame + periodic, 5),
        "share_at_100_fps": round(bare / 1e3 / 10 + periodic, 5),
    }
    if arguments.json:
        print(json.dumps(summary))
    else:
        for name, value in summary.items():
            print(f"{name:20} {value}")


if __name__ == "__main__":
    main()
