"""Measure what the pipeline itself costs: processor time of a run against that of its parts alone.

Run: ``python -m benchmarks.overhead CLIP [--sources 1 4 16] [--modes latency throughput]
[--limit 200] [--repeat 3] [--plain] [--json]``.

Decoding, resizing, the engine and encoding are measured alone, on all frames of the clip, before
and after each run; a subscriber receives the messages in another process. Every source is the same
clip, is tracked, and has a zone and a line, unless ``--plain``. The overhead is the processor time
per frame of the run as a share of the sum of the parts, less 1. Other work on
the machine changes it less than figures on the clock.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import threading
from collections.abc import Sequence
from typing import Any

from maskcast.engines.load import load_engine
from maskcast.engines.memory import limit_heaps
from maskcast.pipeline.cli.profile.alone import measure_file
from maskcast.pipeline.cli.profile.profile import run_pipeline
from maskcast.pipeline.cli.profile.report import ProcessorTimes, processor_times
from maskcast.pipeline.configuration.config import SourceConfig
from maskcast.pipeline.configuration.zones import LineConfig, ZoneConfig


def make_sources(clip: str, count: int, *, plain: bool) -> list[SourceConfig]:
    """Configure the clip several times."""
    names = [f"clip{number}" for number in range(count)]
    if plain:
        return [SourceConfig(url=clip, name=name, track=False) for name in names]
    zone = ZoneConfig(name="middle", polygon=((0.2, 0.2), (0.8, 0.2), (0.8, 0.8), (0.2, 0.8)))
    line = LineConfig(name="half", points=((0.5, 0.0), (0.5, 1.0)))
    return [SourceConfig(url=clip, name=name, zones=(zone,), lines=(line,)) for name in names]


def measure(engine: Any, sources: Sequence[SourceConfig], limit: int) -> ProcessorTimes:
    """Measure the parts, a run, and the parts again."""
    stop, threshold = threading.Event(), engine.manifest.score_threshold

    def measure_alone() -> Any:
        frames = slice(0, limit, 1)
        return measure_file(sources[0], engine, threshold, frames, stop, lambda _: None)

    alone = measure_alone()
    stats, spent_s = run_pipeline(sources, engine, threshold, limit, None, stop, lambda _: None)
    assert stats.processed == len(sources) * alone.frames, "frames were lost"
    alone += measure_alone()
    return processor_times(stats.processed, spent_s, alone)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("clip")
    parser.add_argument("--sources", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--modes", nargs="+", default=["latency", "throughput"])
    parser.add_argument("--limit", type=int, default=200, help="frames of each source")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--plain", action="store_true", help="no tracks, zones and lines")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()

    limit_heaps()
    print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    for mode in arguments.modes:
        engine = load_engine(mode=mode)
        for count in arguments.sources:
            sources = make_sources(arguments.clip, count, plain=arguments.plain)
            times = [measure(engine, sources, arguments.limit) for _ in range(arguments.repeat)]
            shares = [100 * one.overhead for one in times]
            middle = sorted(times, key=lambda one: one.overhead)[len(times) // 2]
            if arguments.json:
                parts = {name: getattr(middle, name) for name in middle.__struct_fields__}
                print(json.dumps({"mode": mode, "sources": count, "percent": shares, "ms": parts}))
                continue
            print(
                f"{mode:10} {count:2} sources: overhead {statistics.median(shares):5.1f} % "
                f"({', '.join(f'{share:.1f}' for share in shares)}), run {middle.run:.2f} ms; "
                f"decode {middle.decode:.2f}, resize {middle.resize:.2f}, "
                f"engine {middle.engine:.2f}, encode {middle.encode:.3f}",
                flush=True,
            )
        engine.close()


if __name__ == "__main__":
    main()
