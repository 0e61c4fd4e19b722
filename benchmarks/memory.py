"""Measure the resident memory of ``maskcast run``: for one 720p stream, and for each further one.

Run: ``python -m benchmarks.memory [--sources 1 2 4] [--modes latency throughput] [--seconds 15]``.

The sources are H.264 clips of 1280x720 that repeat, published to one subscriber. Compiled graphs
come from the cache, as in every start but the first. Reported are the resident memory at the
end, its parts (private, and shared pages of files: libraries and Python's modules), and its peak.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

import maskcast
from benchmarks.pipeline import make_clip

_FIELDS = {"VmRSS": "resident", "RssAnon": "private", "RssFile": "files", "VmHWM": "peak"}


def read_mb(pid: int) -> dict[str, float]:
    """Read the memory of a process, MB."""
    found = {}
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name in _FIELDS:
            found[_FIELDS[name]] = int(value.split()[0]) * 1024 / 1e6
    return found


def measure(folder: Path, clip: Path, count: int, mode: str, seconds: float) -> dict[str, float]:
    """Run for some seconds from the first message; return the memory at the end."""
    endpoint = f"ipc://{folder}/memory"
    config = folder / "memory.yaml"
    sources = [
        {"url": str(clip), "name": f"cam{number}", "loop": True, "policy": "latest"}
        for number in range(count)
    ]
    settings = {"sources": sources, "model": {"mode": mode}, "publish": {"endpoint": endpoint}}
    config.write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "maskcast", "run", "--config", str(config)]
    with maskcast.subscribe(endpoint, timeout_s=120) as subscription:
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        try:
            seen: set[str] = set()
            until_s = 0.0
            for frame in subscription:
                seen.add(frame.source)
                if len(seen) == count:
                    until_s = until_s or time.monotonic() + seconds
                    if time.monotonic() >= until_s:
                        break
            return read_mb(process.pid)
        finally:
            process.terminate()
            process.wait()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--sources", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--modes", nargs="+", default=["latency", "throughput"])
    parser.add_argument("--seconds", type=float, default=15)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
        clip = folder / "clip.mp4"
        make_clip(clip, 90)
        for mode in arguments.modes:
            measure(folder, clip, 1, mode, 0)  # fills the cache
            for count in arguments.sources:
                found = measure(folder, clip, count, mode, arguments.seconds)
                shown = ", ".join(f"{kind} {mb:.0f}" for kind, mb in found.items())
                print(f"{mode:10} {count:2} sources, MB: {shown}", flush=True)


if __name__ == "__main__":
    main()
