"""Count failing runs after which a subscriber misses an ``ended`` event.

Run: ``python -m benchmarks.failing_runs [--runs 200] [--hogs 2]``. In each run one part fails (the
engine's ``detect`` or ``segment``, or a recorder) at its fifth frame, while two sources are being
read and one subscriber is connected. Every source must then end at the subscriber with the reason
``failed``. Busy processes compete for the processor. The exit code is 1 if any run
missed an event.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import threading
import time
from collections.abc import Sequence

import numpy as np

from benchmarks.busy import busy_processes
from maskcast.engines.bundle import GraphFile, Graphs, LongestSideInput, Manifest
from maskcast.engines.engine import Detections, Engine
from maskcast.engines.image import NetworkImage
from maskcast.engines.instances.instances import Instances
from maskcast.pipeline.configuration.config_file import make_config
from maskcast.pipeline.frame import Frame
from maskcast.pipeline.outputs.recorder import Published
from maskcast.pipeline.pipeline import Pipeline
from maskcast.pipeline.subscriber.subscribe import subscribe
from maskcast.pipeline.subscriber.subscription import StreamEvent, Subscription

KINDS = ("detect", "segment", "recorder")
SOURCES = ("a", "b")
FAILS_AT = 5


class FailureError(Exception):
    """The failure that is injected into every run."""


class FailingEngine(Engine):
    """An engine that finds nothing and fails in one of its methods.

    Args:
        kind: the method that fails.
    """

    device = "none"

    def __init__(self, kind: str) -> None:
        self.manifest = Manifest(
            name="failing",
            backend="openvino",
            precision="fp32",
            labels=("background", "thing"),
            input=LongestSideInput(longest_side=96),
            graphs=Graphs(GraphFile("none.onnx", "0" * 64)),
        )
        self.max_batch = 1
        self._kind = kind
        self._calls = {"detect": 0, "segment": 0}

    def detect(self, images: Sequence[NetworkImage], min_score: float) -> Detections:
        """Find nothing, or fail."""
        self._call("detect")
        none = np.zeros(0, np.float32)
        return Detections(
            images=images,
            boxes=none.reshape(0, 4),
            scores=none,
            labels=none.astype(np.int32),
            image_index=none.astype(np.int32),
            features=None,
            release=lambda: None,
        )

    def segment(self, detections: Detections) -> list[Instances]:
        """Return empty instances, or fail."""
        self._call("segment")
        return [
            Instances(
                image.source[1],
                image.source[0],
                detections.boxes,
                detections.scores,
                detections.labels,
                np.zeros((0, 28, 28), np.uint8),
            )
            for image in detections.images
        ]

    def close(self) -> None:
        """Free nothing."""

    def _call(self, name: str) -> None:
        self._calls[name] += 1
        if self._kind == name and self._calls[name] >= FAILS_AT:
            raise FailureError


def run_once(kind: str, endpoint: str) -> dict[str, str]:
    """Run until the failure; return the reason of every ``ended`` event received, by source."""
    count = 0

    def record(_frame: Frame, _instances: Instances, _published: Published) -> None:
        nonlocal count
        count += 1
        if kind == "recorder" and count >= FAILS_AT:
            raise FailureError

    config = make_config(
        {
            "sources": [{"url": "test://64x48@100", "name": name} for name in SOURCES],
            "publish": {"endpoint": endpoint, "wait_subscribers": 1},
        }
    )
    ended: dict[str, str] = {}
    with subscribe(endpoint, policy="all", events=True, timeout_s=120) as stream:
        reader = threading.Thread(target=_collect, args=(stream, ended))
        reader.start()
        try:
            Pipeline(config, FailingEngine(kind), on_frame=record).run()
        except FailureError:
            reader.join(5)
        stream.close()
        reader.join()
    return ended


def _collect(stream: Subscription, ended: dict[str, str]) -> None:
    for item in stream:
        if isinstance(item, StreamEvent) and item.name == "ended":
            ended[item.source] = str(item.data.get("reason"))


def main() -> None:
    """Run all kinds and print how many runs missed an event."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--hogs", type=int, default=2)
    arguments = parser.parse_args()
    logging.disable(logging.CRITICAL)
    expected = dict.fromkeys(SOURCES, "failed")
    missed_any = False
    with busy_processes(arguments.hogs), tempfile.TemporaryDirectory() as folder:
        for kind in KINDS:
            began_s, missed = time.monotonic(), 0
            for number in range(arguments.runs):
                ended = run_once(kind, f"ipc://{folder}/{kind}{number}")
                if ended != expected:
                    missed += 1
                    print(f"{kind} {number}: {ended}", flush=True)
            took_s = time.monotonic() - began_s
            print(f"{kind}: {missed} missed of {arguments.runs} ({took_s:.0f} s)", flush=True)
            missed_any |= missed > 0
    sys.exit(missed_any)


if __name__ == "__main__":
    main()
