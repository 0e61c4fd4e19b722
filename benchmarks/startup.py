"""Measure how long a start takes, from the command to its first message.

Run: ``python -m benchmarks.startup CLIP [--repeat 5] [--view]``.

For both modes the command runs once with an empty cache of compiled graphs (cold) and then with a
full one (warm); Python's own caches and the system's file cache are warm in both. Reported are
wall time and processor time, which other work on the machine changes less.
With ``--view`` the command serves the browser view, and a websocket client waits for the first
frame with instances. ``maskcast --help`` is measured as well.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import maskcast
from benchmarks.view import processor_s

COMMAND = (sys.executable, "-m", "maskcast")


class Start(NamedTuple):
    """Wall time and processor time of a start, in seconds, of the command's own process."""

    wall_s: float
    processor_s: float


def start_until(command: list[str], wait: Callable[[subprocess.Popen[str]], object]) -> Start:
    """Start a command, wait for something and end it."""
    began_s = time.monotonic()
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        wait(process)
        return Start(time.monotonic() - began_s, processor_s(process.pid))
    finally:
        process.terminate()
        process.communicate()


def until_message(clip: str, mode: str) -> Start:
    """Run until a subscriber has received the first message."""
    with tempfile.TemporaryDirectory() as folder:
        endpoint = f"ipc://{folder}/start"
        command = [*COMMAND, "run", clip, "--mode", mode, "--publish", endpoint]
        with maskcast.subscribe(endpoint, timeout_s=120) as subscription:
            return start_until(
                [*command, "--wait-subscribers", "1"], lambda _: next(iter(subscription))
            )


def until_view(clip: str, mode: str) -> Start:
    """Run with the view until a websocket client has received the first frame with instances."""
    from websockets.exceptions import WebSocketException
    from websockets.sync.client import connect

    def wait(process: subprocess.Popen[str]) -> None:
        assert process.stderr is not None
        url = process.stderr.readline().split()[1]
        while True:
            try:
                client = connect(
                    url.replace("http:", "ws:") + "stream", max_size=None, compression=None
                )
                break
            except (OSError, WebSocketException):
                time.sleep(0.01)
        with client:
            client.send("")
            while isinstance(client.recv(timeout=120), str):
                pass

    with tempfile.TemporaryDirectory() as folder:
        command = [*COMMAND, "run", clip, "--mode", mode, "--publish", f"ipc://{folder}/start"]
        return start_until([*command, "--view", "--view-http", "127.0.0.1:0"], wait)


def until_help() -> Start:
    """Measure the printing of the command's help."""
    began_s, before = time.monotonic(), os.times()
    subprocess.run([*COMMAND, "--help"], stdout=subprocess.DEVNULL, check=True)
    after = os.times()
    spent_s = sum(after[2:4]) - sum(before[2:4])
    return Start(time.monotonic() - began_s, spent_s)


def report(what: str, starts: list[Start]) -> None:
    """Print medians, and the slowest."""
    wall_s = [start.wall_s for start in starts]
    spent_s = statistics.median(start.processor_s for start in starts)
    print(
        f"{what:32} {statistics.median(wall_s):5.2f} s (at most {max(wall_s):.2f}), "
        f"{spent_s:.2f} s of processor time",
        flush=True,
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("clip")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--view", action="store_true", help="measure the browser view, too")
    arguments = parser.parse_args()
    print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    repeats = range(arguments.repeat)
    report("--help", [until_help() for _ in repeats])
    kinds: dict[str, Callable[[str, str], Start]] = {"first message": until_message}
    if arguments.view:
        kinds["first frame of the view"] = until_view
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        for what, measure in kinds.items():
            for mode in ("throughput", "latency"):
                cold = []
                for _ in repeats:
                    shutil.rmtree(Path(folder) / "maskcast", ignore_errors=True)
                    cold.append(measure(arguments.clip, mode))
                warm = [measure(arguments.clip, mode) for _ in repeats]
                report(f"{what}, {mode}, cold", cold)
                report(f"{what}, {mode}, warm", warm)


if __name__ == "__main__":
    main()
