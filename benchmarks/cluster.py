"""Measure how long a cluster takes to restore a source: from kill -9 to a frame of its new worker.

Run: ``python -m benchmarks.cluster [--workers 5] [--nodes 2] [--gateways 2] [--json]``.

Two Ray nodes run on this machine's loopback, with one test pattern each at 10 frames per second and
the default model. Workers, the gateway and raylets are killed in turn. For a worker and a node, the
time ends when a subscriber receives a frame from another publisher; for the gateway, when it
receives a frame again. A killed node is replaced by a new one before the next is killed.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from maskcast.engines.errors import InputError
from maskcast.pipeline.control.client import ControlClient
from maskcast.pipeline.control.messages import Placement, SourceReport
from maskcast.pipeline.subscriber.subscribe import subscribe

SOURCES = ("door", "yard")
TIMEOUT_S = 120.0
SETTLED_S = 5.0
ENVIRONMENT = os.environ | {
    "RAY_AUTH_MODE": "disabled",  # everything is on loopback
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # makes Ray use the loopback address
}


class Nodes:
    """Ray nodes, run by ``benchmarks.ray_nodes`` in a process of its own."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.ray_nodes"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=ENVIRONMENT,
        )
        self.address = self._answer()

    def add(self, name: str) -> int:
        """Add a node; return its raylet's process id."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{name}\n")
        self._process.stdin.flush()
        return int(self._answer())

    def close(self) -> None:
        """End all nodes."""
        self._process.communicate()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:  # Ray writes there too
            if line.startswith("said "):
                return line.split()[1]
        raise SystemExit("the nodes have ended")


class Watch:
    """Records the publisher and the time of the last frame of each source."""

    def __init__(self, endpoint: str) -> None:
        self.last: dict[str, tuple[str, float]] = {}
        self._subscription: Any = subscribe(
            endpoint, policy="all", timeout_s=TIMEOUT_S, until_ended=False
        ).open()
        self._thread = threading.Thread(target=self._read, name="watch")
        self._thread.start()

    def close(self) -> None:
        """Stop reading."""
        self._subscription.close()
        self._thread.join()

    def _read(self) -> None:
        for frame in self._subscription:
            self.last[frame.source] = (frame.publisher, time.monotonic())


def time_until(act: Callable[[], None], is_back: Callable[[], bool]) -> float:
    """Call ``act`` and return the seconds until ``is_back``."""
    began_s = time.monotonic()
    act()
    wait_until(is_back)
    return time.monotonic() - began_s


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait for a condition; exit if it takes too long."""
    deadline_s = time.monotonic() + TIMEOUT_S
    while not condition():
        if time.monotonic() > deadline_s:
            raise SystemExit(f"a condition did not hold within {TIMEOUT_S:.0f} s")
        time.sleep(0.005)


def is_running(source: SourceReport) -> bool:
    """Return whether a source publishes."""
    return source.placement is Placement.RUNNING and source.processed > 0


def measure(workers: int, nodes: int, gateways: int) -> dict[str, list[float]]:
    """Return the seconds of each recovery, by what was killed."""
    seconds: dict[str, list[float]] = {"worker": [], "gateway": [], "node": []}
    with ExitStack() as closing:
        folder = Path(closing.enter_context(tempfile.TemporaryDirectory()))
        ray = Nodes()
        closing.callback(ray.close)
        raylet = ray.add("node-0")
        endpoint, control = f"ipc://{folder}/messages", f"ipc://{folder}/control"
        config = folder / "fleet.yaml"
        sources = [{"name": name, "url": "test://640x360@10"} for name in SOURCES]
        config.write_text(json.dumps({"sources": sources, "cluster": {"gateway": endpoint}}))
        supervisor = subprocess.Popen(
            [
                *(sys.executable, "-m", "maskcast", "cluster", "--control", control, "run"),
                *("--config", config, "--address", ray.address, "--log-level", "error"),
            ],
            env=ENVIRONMENT,
            stderr=subprocess.DEVNULL,
        )
        closing.callback(supervisor.wait)
        closing.callback(supervisor.terminate)
        client = ControlClient(control, TIMEOUT_S)

        def kill(pid: int | None) -> Callable[[], None]:
            assert pid
            return lambda: os.kill(pid, signal.SIGKILL)

        def settle() -> None:
            wait_until(lambda: all(is_running(source) for source in client.list()))
            time.sleep(SETTLED_S)

        settle()
        watch = Watch(endpoint)
        closing.callback(watch.close)
        wait_until(lambda: len(watch.last) == len(SOURCES))

        def is_elsewhere(before: dict[str, tuple[str, float]]) -> Callable[[], bool]:
            return lambda: all(watch.last[name][0] != before[name][0] for name in before)

        def is_newer(before: dict[str, tuple[str, float]]) -> Callable[[], bool]:
            return lambda: all(watch.last[name] != before[name] for name in before)

        for number in range(workers):
            name = SOURCES[number % len(SOURCES)]
            settle()
            pid = next(source.pid for source in client.list() if source.name == name)
            before = {name: watch.last[name]}
            seconds["worker"].append(time_until(kill(pid), is_elsewhere(before)))
        for _ in range(gateways):
            settle()
            kill(client.status()[0].gateway.pid)()
            time.sleep(0.05)  # until the subscriber has received the frames in flight
            seconds["gateway"].append(time_until(lambda: None, is_newer(dict(watch.last))))
        for number in range(nodes):
            name = f"node-{number}"
            for source in client.list():
                if source.node != name:
                    client.move(source.name, name)
            settle()
            before = dict(watch.last)
            seconds["node"].append(time_until(kill(raylet), is_elsewhere(before)))
            raylet = ray.add(f"node-{number + 1}")
    return seconds


def main() -> None:
    """Measure, and print the times."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--workers", type=int, default=5, help="workers to kill")
    parser.add_argument("--gateways", type=int, default=2, help="gateways to kill")
    parser.add_argument("--nodes", type=int, default=2, help="nodes to kill")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    try:
        seconds = measure(options.workers, options.nodes, options.gateways)
    except InputError as error:
        raise SystemExit(str(error)) from None
    if options.json:
        sys.stdout.write(json.dumps(seconds) + "\n")
        return
    table = Table("killed", "times", "median s", "longest s")
    for what, times in seconds.items():
        if times:
            table.add_row(
                what, str(len(times)), f"{statistics.median(times):.1f}", f"{max(times):.1f}"
            )
    Console().print(table)


if __name__ == "__main__":
    main()
