"""Measure how ``--save`` affects the messages of four live 1080p sources.

Runs four test patterns alternately without and with annotated video. The engine uses no processor
time, so that only decoding, publishing, drawing and x264 compete for it. The age of the messages at
a subscriber and the frames dropped before publishing should be the same, even if the recorder is
behind; the frames that it misses are counted separately.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import quantiles
from typing import Any

from maskcast.pipeline.configuration.config_file import make_config
from maskcast.pipeline.pipeline import Pipeline
from maskcast.pipeline.subscriber.subscribe import subscribe

ROOT = Path(__file__).parents[1]


def run(seconds: float, fps: int, save: bool, size: str) -> dict[str, Any]:
    """Run four sources for a while; return figures of the messages and of the recording."""
    sys.path.insert(0, str(ROOT))
    from tests.conftest import TimedEngine

    with tempfile.TemporaryDirectory() as folder:
        endpoint = f"ipc://{folder}/socket"
        config = make_config(
            {
                "sources": [{"url": f"test://{size}@{fps}", "name": f"cam{n}"} for n in range(4)],
                "publish": {"endpoint": endpoint, "wait_subscribers": 1},
                "outputs": {"save": f"{folder}/out.mp4"} if save else {},
            }
        )
        ages_ms: list[float] = []

        def listen() -> None:
            frames = subscribe(endpoint, policy="all", timeout_s=60)
            ages_ms.extend(frame.age_ms for frame in frames)

        listener = threading.Thread(target=listen)
        listener.start()
        pipeline = Pipeline(config, TimedEngine(0.001, 0.001))
        pipeline.start()
        time.sleep(seconds)
        pipeline.stop()
        pipeline.join()
        listener.join()
        stats = pipeline.stats()
    shares = quantiles(ages_ms, n=100)
    return {
        "save": save,
        "captured": stats.captured,
        "published": stats.processed,
        "dropped": {" ".join(key): count for key, count in stats.dropped.items()},
        "unrecorded": sum(sum(source.unrecorded.values()) for source in stats.sources),
        "age_p50_ms": round(shares[49], 2),
        "age_p99_ms": round(shares[98], 2),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--fps", type=int, default=10)
    parser.add_argument("--size", default="1920x1080")
    parser.add_argument("--repeat", type=int, default=2)
    arguments = parser.parse_args()
    for _ in range(arguments.repeat):
        for save in (False, True):
            print(json.dumps(run(arguments.seconds, arguments.fps, save, arguments.size)))


if __name__ == "__main__":
    main()
