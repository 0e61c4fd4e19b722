"""Measure how quickly a killed camera delivers frames again, and whether reconnecting leaks.

Run: ``python -m benchmarks.chaos [--times N] [--transport tcp|udp] [--json]``. It needs GStreamer's
RTSP server (`make debian`). In each round the server is killed and started again after a random
0.2 to 4 s. The time is measured from when it listens until the first frame. Handles, threads and
memory are read while the camera streams, after the first tenth of the rounds and at the end.
"""

from __future__ import annotations

import argparse
import json
import random
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from maskcast.pipeline.configuration.config import SourceConfig
from maskcast.pipeline.sources.live import LiveSource
from maskcast.pipeline.sources.state import SourceState, StateChange

SYSTEM_PYTHON = "/usr/bin/python3"
SERVER = Path(__file__).parents[1] / "tests" / "rtsp_server.py"
TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Footprint:
    """The handles, threads and memory of the process."""

    handles: int
    threads: int
    rss_kib: int


class Reader(threading.Thread):
    """Reads a camera and records every change of its state."""

    def __init__(self, config: SourceConfig) -> None:
        super().__init__(name="reader", daemon=True)
        self.stopping = threading.Event()
        self.changes: list[tuple[float, StateChange]] = []
        self.frames = 0
        self._config = config

    def run(self) -> None:
        """Read until ``stopping`` is set."""
        with LiveSource(self._config, self._note, self.stopping) as source:
            for _ in source:
                self.frames += 1

    def wait_for(self, state: SourceState) -> float:
        """Wait for a state; return the time at which it began."""
        deadline_s = time.monotonic() + TIMEOUT_S
        while not self.changes or self.changes[-1][1].state is not state:
            if time.monotonic() > deadline_s:
                raise SystemExit(f"the source is not {state} after {TIMEOUT_S:g} s")
            time.sleep(0.001)
        return self.changes[-1][0]

    def _note(self, change: StateChange) -> None:
        self.changes.append((time.monotonic(), change))


@contextmanager
def camera(port: int) -> Iterator[None]:
    """Start a camera that listens; kill it at the end."""
    with subprocess.Popen(
        [SYSTEM_PYTHON, str(SERVER), "--port", str(port)], stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            if process.stdout is None or process.stdout.readline() != "ready\n":
                raise SystemExit(
                    "the RTSP server does not start; install GStreamer's (make debian)"
                )
            yield
        finally:
            process.kill()


def footprint() -> Footprint:
    """Read the handles, threads and memory of this process."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    handles = len(list(Path("/proc/self/fd").iterdir()))
    return Footprint(handles, int(status["Threads"]), int(status["VmRSS"].split()[0]))


def summarise(waits_s: list[float], begin: Footprint, end: Footprint) -> dict[str, object]:
    """Summarise the measurements."""
    p50, p95, p99 = np.percentile(waits_s, [50, 95, 99])
    return {
        "times": len(waits_s),
        "first_frame_s": {
            "p50": round(float(p50), 3),
            "p95": round(float(p95), 3),
            "p99": round(float(p99), 3),
            "max": round(max(waits_s), 3),
        },
        "within_2_s": sum(wait_s <= 2.0 for wait_s in waits_s),
        "begin": asdict(begin),
        "end": asdict(end),
    }


def main() -> None:
    """Kill, restart, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=100)
    parser.add_argument("--transport", choices=["tcp", "udp"], default="tcp")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    rng = random.Random(0)
    reader = Reader(
        SourceConfig(url=f"rtsp://127.0.0.1:{port}/cam", rtsp_transport=arguments.transport)
    )
    waits_s: list[float] = []
    begin: Footprint | None = None
    end: Footprint | None = None
    with camera(port):
        reader.start()
        reader.wait_for(SourceState.STREAMING)
        time.sleep(1.0)
    for number in range(arguments.times):
        reader.wait_for(SourceState.RECONNECTING)
        time.sleep(rng.uniform(0.2, 4.0))
        with camera(port):
            listening_s = time.monotonic()
            waits_s.append(reader.wait_for(SourceState.STREAMING) - listening_s)
            time.sleep(0.5)
            end = footprint()
            if begin is None and number + 1 >= arguments.times / 10:
                begin = end
    reader.stopping.set()
    reader.join(TIMEOUT_S)

    assert begin is not None
    assert end is not None
    summary = summarise(waits_s, begin, end)
    if arguments.json:
        print(json.dumps(summary))
    else:
        for name, value in summary.items():
            print(f"{name:14} {value}")


if __name__ == "__main__":
    main()
