"""Measure memory, handles, threads and latency of ``maskcast run`` over hours.

Run: ``python -m benchmarks.soak [--minutes 60] [--streams 4] [--faults-every 20] [--out FILE]``. A
real process reads several RTSP cameras (GStreamer's server, `make debian`; without it the test
pattern) and publishes to a subscriber here. It is sampled from outside every few seconds. With
faults, a camera is sometimes killed and started again, or stopped (SIGSTOP) and continued, or a
second subscriber connects, stops reading and is killed. At the end the process receives SIGTERM.

The first fifth of the time, at most ten minutes, is warm-up and not reported. Reported are the
slope of the memory by Theil-Sen regression (the median of the slopes between any two samples, which
a few outliers do not change), and the difference between the medians of the last and the first
tenth. The exit code is 1 if the process died, did not exit cleanly, or a source had stopped.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.chaos import SERVER, SYSTEM_PYTHON
from maskcast.pipeline.subscriber.subscribe import subscribe
from maskcast.pipeline.subscriber.subscription import StreamEvent

FPS = 10
START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 10.0
ABSENCE_S = (0.5, 8.0)
"""Shortest and longest absence of a camera, seconds: below and above the read timeout."""
READ_TIMEOUT_S = 3.0
TIMEOUT_S = 600.0
"""The subscriber fails after this time without a message."""
STALLED_S = 12.0
"""A subscriber that has stopped reading is killed after this time."""
SETTLING_S = 20.0
"""No faults in this last part of the run, so that the effects of the last one are over."""


@dataclass(frozen=True, slots=True)
class Sample:
    """The process seen from outside, and the frames received since the previous sample."""

    at_s: float
    rss_mib: float
    handles: int
    threads: int
    frames: int
    lost: int
    p50_ms: float | None
    p95_ms: float | None
    healthy: bool


class Camera:
    """An RTSP server in a process of its own, which can be stopped and killed."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._process: subprocess.Popen[str] | None = None
        self.url = f"rtsp://127.0.0.1:{port}/cam"

    def start(self) -> None:
        """Start it and wait until it listens."""
        self._process = subprocess.Popen(
            [SYSTEM_PYTHON, str(SERVER), "--port", str(self._port), "--fps", str(FPS)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self._process.stdout is not None
        if self._process.stdout.readline() != "ready\n":
            self.kill()
            raise FileNotFoundError("the RTSP server does not start")

    def signal(self, number: signal.Signals) -> None:
        """Send a signal, to stop or continue it."""
        if self._process is not None:
            self._process.send_signal(number)

    def kill(self) -> None:
        """Kill it."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


class Listener(threading.Thread):
    """Subscribes to all sources and records the age of each frame."""

    def __init__(self, endpoint: str) -> None:
        super().__init__(name="listener", daemon=True)
        self._endpoint = endpoint
        self._lock = threading.Lock()
        self._ages_ms: list[float] = []
        self._lost = 0
        self.received: Counter[str] = Counter()
        self.last_s: dict[str, float] = {}

    def run(self) -> None:
        """Receive until all sources have ended."""
        for item in subscribe(self._endpoint, policy="all", events=True, timeout_s=TIMEOUT_S):
            if isinstance(item, StreamEvent):
                continue
            with self._lock:
                self._ages_ms.append(item.age_ms)
                self._lost += item.lost_before
                self.received[item.source] += 1
                self.last_s[item.source] = time.monotonic()

    def take(self) -> tuple[list[float], int]:
        """Return the ages of the frames since the last call, and the number of lost ones."""
        with self._lock:
            taken, self._ages_ms = (self._ages_ms, self._lost), []
            self._lost = 0
        return taken


class Faults(threading.Thread):
    """Injects a fault into a camera or the publisher every few seconds."""

    def __init__(self, cameras: Sequence[Camera], endpoint: str, every_s: float) -> None:
        super().__init__(name="faults", daemon=True)
        self._cameras = cameras
        self._endpoint = endpoint
        self._every_s = every_s
        self._chance = random.Random(0)
        self.over = threading.Event()
        self.count: Counter[str] = Counter()

    def run(self) -> None:
        """Inject faults until ``over`` is set."""
        kinds = (self._kill_camera, self._stop_camera, self._stalled_subscriber)
        while not self.over.wait(self._every_s):
            fault = self._chance.choice(kinds if self._cameras else kinds[2:])
            fault()
            self.count[fault.__name__.removeprefix("_").replace("_", " ")] += 1

    def _kill_camera(self) -> None:
        camera = self._chance.choice(self._cameras)
        camera.kill()
        self.over.wait(self._chance.uniform(*ABSENCE_S))
        camera.start()

    def _stop_camera(self) -> None:
        camera = self._chance.choice(self._cameras)
        camera.signal(signal.SIGSTOP)
        self.over.wait(self._chance.uniform(*ABSENCE_S))
        camera.signal(signal.SIGCONT)

    def _stalled_subscriber(self) -> None:
        with subprocess.Popen(
            [sys.executable, "-m", "maskcast", "watch", self._endpoint, "--json"],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        ) as process:
            assert process.stdout is not None
            process.stdout.readline()  # it is subscribed
            process.send_signal(signal.SIGSTOP)
            self.over.wait(STALLED_S)
            process.kill()


def slope_per_hour(times_s: Sequence[float], values: Sequence[float]) -> float:
    """Return the median of the slopes between any two points, per hour (Theil 1950, Sen 1968)."""
    x, y = np.asarray(times_s) / 3600, np.asarray(values)
    first, second = np.triu_indices(len(x), k=1)
    if not len(first):
        return 0.0
    return float(np.median((y[second] - y[first]) / (x[second] - x[first])))


def drift(values: Sequence[float]) -> float:
    """Return how far the median of the last tenth is above that of the first."""
    if not values:
        return 0.0
    tenth = max(1, len(values) // 10)
    return float(np.median(values[-tenth:]) - np.median(values[:tenth]))


def warmed_up(samples: Sequence[Sample]) -> list[Sample]:
    """Return the samples after the first fifth of the time, at most ten minutes."""
    begin_s = min(samples[-1].at_s / 5, 600.0) if samples else 0.0
    return [sample for sample in samples if sample.at_s >= begin_s]


def summarise(samples: Sequence[Sample]) -> dict[str, float | int]:
    """Summarise all samples."""
    kept = warmed_up(samples)
    p50 = [sample.p50_ms for sample in kept if sample.p50_ms is not None]
    p95 = [sample.p95_ms for sample in kept if sample.p95_ms is not None]
    rss = [sample.rss_mib for sample in kept]
    return {
        "samples": len(kept),
        "rss_mib": round(float(np.median(rss)), 1),
        "rss_peak_mib": round(max(rss), 1),
        "rss_slope_mib_per_h": round(slope_per_hour([each.at_s for each in kept], rss), 2),
        "rss_drift_mib": round(drift(rss), 2),
        "handles_drift": drift([sample.handles for sample in kept]),
        "threads_drift": drift([sample.threads for sample in kept]),
        "p50_ms": round(float(np.median(p50)), 1) if p50 else 0.0,
        "p50_drift_ms": round(drift(p50), 1),
        "p95_ms": round(float(np.median(p95)), 1) if p95 else 0.0,
        "p95_drift_ms": round(drift(p95), 1),
        "frames": sum(sample.frames for sample in samples),
        "lost": sum(sample.lost for sample in samples),
        "healthy_share": round(sum(each.healthy for each in kept) / max(1, len(kept)), 3),
    }


def take_sample(process_id: int, at_s: float, listener: Listener, health_url: str) -> Sample:
    """Take a sample."""
    folder = Path("/proc", str(process_id))
    fields = (line.split(":", 1) for line in (folder / "status").read_text().splitlines())
    status = dict(fields)
    ages_ms, lost = listener.take()
    p50, p95 = np.percentile(ages_ms, [50, 95]).tolist() if ages_ms else (None, None)
    return Sample(
        at_s=round(at_s, 2),
        rss_mib=int(status["VmRSS"].split()[0]) / 1024,
        handles=len(list((folder / "fd").iterdir())),
        threads=int(status["Threads"]),
        frames=len(ages_ms),
        lost=lost,
        p50_ms=p50,
        p95_ms=p95,
        healthy=is_healthy(health_url),
    )


def is_healthy(url: str) -> bool:
    """Ask ``/healthz``."""
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def free_ports(count: int) -> list[int]:
    """Return free TCP ports."""
    with ExitStack() as probes:
        found = [probes.enter_context(socket.socket()) for _ in range(count)]
        for probe in found:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in found]


def start_cameras(ports: Sequence[int]) -> list[Camera]:
    """Start cameras; return none if there is no RTSP server."""
    cameras = [Camera(port) for port in ports]
    try:
        for camera in cameras:
            camera.start()
    except OSError:
        for camera in cameras:
            camera.kill()
        return []
    return cameras


def soak(
    folder: Path, minutes: float, streams: int, faults_every_s: float | None, sample_every_s: float
) -> dict[str, object]:
    """Run the process and return the results."""
    *camera_ports, publish_port, metrics_port = free_ports(streams + 2)
    endpoint = f"tcp://127.0.0.1:{publish_port}"
    health_url = f"http://127.0.0.1:{metrics_port}/healthz"
    with ExitStack() as ending:
        cameras = start_cameras(camera_ports)
        for camera in cameras:
            ending.callback(camera.kill)
        urls = [camera.url for camera in cameras] or [f"test://320x240@{FPS}"] * streams
        config = {
            "sources": [
                {"url": url, "name": f"cam{number}", "read_timeout_s": READ_TIMEOUT_S}
                for number, url in enumerate(urls)
            ],
            "publish": {"endpoint": endpoint},
            "metrics": {"address": f"127.0.0.1:{metrics_port}"},
        }
        (folder / "soak.yaml").write_text(json.dumps(config))  # JSON is YAML
        log = ending.enter_context((folder / "soak.log").open("wb"))
        process = subprocess.Popen(
            [sys.executable, "-m", "maskcast", "run", "--config", str(folder / "soak.yaml")],
            stdout=log,
            stderr=log,
        )
        ending.callback(process.kill)
        listener = Listener(endpoint)
        listener.start()
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while not is_healthy(health_url) or len(listener.received) < streams:
            if process.poll() is not None or time.monotonic() > deadline_s:
                log.flush()
                raise SystemExit(
                    f"maskcast run does not deliver:\n{(folder / 'soak.log').read_text()}"
                )
            time.sleep(0.2)
        faults = Faults(cameras, endpoint, faults_every_s or 1.0)
        if faults_every_s is not None:
            faults.start()
        samples: list[Sample] = []
        began_s = time.monotonic()
        listener.take()
        while (at_s := time.monotonic() - began_s) < 60 * minutes and process.poll() is None:
            if at_s > 60 * minutes - SETTLING_S:
                faults.over.set()
            time.sleep(sample_every_s)
            if process.poll() is None:
                at_s = time.monotonic() - began_s
                samples.append(take_sample(process.pid, at_s, listener, health_url))
        faults.over.set()
        if faults.ident is not None:
            faults.join()
        now_s = time.monotonic()
        delivering = sum(now_s - last_s < SETTLING_S for last_s in listener.last_s.values())
        process.send_signal(signal.SIGTERM)
        try:
            exit_code = process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            exit_code = None
        ended_s = time.monotonic() - now_s
    return {
        "minutes": minutes,
        "source": "RTSP" if cameras else "test pattern",
        "streams": streams,
        "faults": dict(faults.count),
        **summarise(samples),
        "delivering_at_the_end": delivering,
        "exit_code": exit_code,
        "ended_within_s": round(ended_s, 2),
        "samples_all": [asdict(sample) for sample in samples],
    }


def main() -> None:
    """Run, print the results, and write the samples."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--faults-every", type=float, metavar="S", help="seconds; none by default")
    parser.add_argument("--sample-every", type=float, default=5.0, metavar="S")
    parser.add_argument("--out", type=Path, metavar="FILE", help="all figures and samples, JSON")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = soak(
            Path(folder),
            arguments.minutes,
            arguments.streams,
            arguments.faults_every,
            arguments.sample_every,
        )
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    table = Table(title=f"{arguments.streams} streams, {arguments.minutes:g} minutes")
    table.add_column("figure")
    table.add_column("value", justify="right")
    for name, value in found.items():
        if name != "samples_all":
            table.add_row(name, str(value))
    Console().print(table)
    if found["exit_code"] != 0 or found["delivering_at_the_end"] != arguments.streams:
        sys.exit(1)


if __name__ == "__main__":
    main()
