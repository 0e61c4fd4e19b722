"""Runs that start together with an empty cache folder, as the workers of a cluster do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from parity import PORTRAIT

import maskcast

ROOT = Path(maskcast.__file__).parents[1]
TIMEOUT_S = 240.0

COMMAND = "from maskcast import main; main()"
WRITES_HALF = """
import os, time, types
from maskcast.engines import user_cache

class Half:
    def __init__(self, file):
        self.file = file

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def writelines(self, parts):
        content = b"".join(parts)
        self.file.write(content[: len(content) // 2])
        self.file.flush()
        print("writing", flush=True)
        time.sleep(600)

def fdopen(number, mode):
    return Half(os.fdopen(number, mode))

user_cache.os = types.SimpleNamespace(environ=os.environ, fdopen=fdopen)
"""
"""Blocks in the middle of the first file that it writes to the cache."""


class Run:
    """A ``maskcast run`` of one image."""

    def __init__(self, folder: Path, name: str, code: str = COMMAND) -> None:
        self._lines = folder / f"{name}.jsonl"
        options = ("--publish", f"ipc://{folder}/{name}", "--jsonl", str(self._lines))
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-c", code, "run", str(PORTRAIT), *options),
                *("--log-level", "info", "--log-format", "json"),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(folder / "cache")},
        )

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def finish(self) -> tuple[Any, list[bool]]:
        """Return the instances of the image, and whether its graphs came from the cache."""
        _, errors = self.process.communicate(timeout=TIMEOUT_S)
        assert self.process.returncode == 0, errors
        events = [json.loads(line) for line in errors.splitlines() if line.startswith("{")]
        assert not [event for event in events if event["level"] in ("warning", "error")], errors
        (frame,) = map(json.loads, self._lines.read_text().splitlines())
        cached = [event["cached"] for event in events if event["event"] == "graphs_ready"]
        return frame["instances"], cached


def files(folder: Path) -> list[str]:
    """Return the suffixes of the files in the cache."""
    return sorted(path.suffix for path in (folder / "cache/maskcast/openvino").iterdir())


def assert_same(first: Any, second: Any) -> None:
    assert first
    for name in ("box", "score"):
        given, other = ([one[name] for one in instances] for instances in (first, second))
        np.testing.assert_allclose(given, other, rtol=0.01, atol=0.01)


def test_two_runs_are_right_and_leave_a_cache_that_the_next_loads(tmp_path: Path) -> None:
    with Run(tmp_path, "a") as one, Run(tmp_path, "b") as other:
        results = [one.finish()[0], other.finish()[0]]
    assert files(tmp_path) == [".graphs"]
    with Run(tmp_path, "c") as later:
        instances, cached = later.finish()
    assert cached == [True]
    for result in results:
        assert_same(result, instances)


def test_a_run_that_is_killed_while_it_writes_harms_no_other(
    tmp_path: Path,
) -> None:
    with ExitStack() as running:
        killed = running.enter_context(Run(tmp_path, "a", WRITES_HALF + COMMAND))
        assert killed.process.stdout is not None
        assert killed.process.stdout.readline() == "writing\n"
        other = running.enter_context(Run(tmp_path, "b"))
        killed.process.kill()
        result, _ = other.finish()
        assert files(tmp_path) == [".graphs", ".pending"]
        instances, cached = running.enter_context(Run(tmp_path, "c")).finish()
    assert cached == [True]
    assert_same(result, instances)
