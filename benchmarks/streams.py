"""Measure the processor time per frame with one source and with many.

Run: ``python -m benchmarks.streams [--counts 1 4 16] [--fps 32] [--seconds 10] [--json]``.

The same number of frames per second is divided among a growing number of test patterns of 640x360,
and goes through the default model to one subscriber in this process. Compared is the processor time
of this process, divided by the number of published frames.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import threading
import time
from collections import deque

from rich.console import Console
from rich.table import Table

from maskcast.engines.engine import Engine
from maskcast.engines.load import load_engine
from maskcast.pipeline.configuration.config import Config, PublishConfig, SourceConfig
from maskcast.pipeline.pipeline import Pipeline
from maskcast.pipeline.subscriber.subscribe import subscribe


def run(engine: Engine, count: int, fps: float, seconds: float) -> dict[str, float]:
    """Run ``count`` sources; return the milliseconds of processor time per frame, among others."""
    frames_of_each = round(fps / count * seconds)
    sources = tuple(
        SourceConfig(url=f"test://640x360@{fps / count:g}", name=f"pattern{number}")
        for number in range(count)
    )
    with tempfile.TemporaryDirectory() as folder:
        endpoint = f"ipc://{folder}/streams"
        publish = PublishConfig(endpoint=endpoint, wait_subscribers=1)
        pipeline = Pipeline(
            Config(sources=sources, publish=publish), engine, limit=max(1, frames_of_each)
        )
        with subscribe(endpoint, policy="all", timeout_s=60) as subscription:
            listener = threading.Thread(target=lambda: deque(subscription, maxlen=0), daemon=True)
            listener.start()
            began_s = time.process_time()
            pipeline.start()
            pipeline.join()
            spent_s = time.process_time() - began_s
        listener.join()
    stats = pipeline.stats()
    return {
        "streams": count,
        "processed": stats.processed,
        "dropped": stats.dropped.total(),
        "cpu_ms": 1000 * spent_s / stats.processed,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--fps", type=float, default=32, help="of all sources together")
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args()
    engine = load_engine("default")
    try:
        run(engine, 1, arguments.fps, 1)  # compiles the graphs for the shape
        found = [run(engine, n, arguments.fps, arguments.seconds) for n in arguments.counts]
    finally:
        engine.close()
    if arguments.json:
        print(json.dumps(found))
        return
    table = Table("streams", "processed", "dropped", "processor ms per frame", "of the first")
    for row in found:
        share = row["cpu_ms"] / found[0]["cpu_ms"]
        cells = (f"{row['streams']:g}", f"{row['processed']:g}", f"{row['dropped']:g}")
        table.add_row(*cells, f"{row['cpu_ms']:.1f}", f"{share:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
