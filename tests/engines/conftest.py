"""CUDA without a GPU: kernels compiled for the host, and tests on a driver over host memory.

A test marked ``host_gpu`` runs in a child process whose ``libcuda.so.1`` is the host driver of
tests/cuda_on_host, so that neither a real driver nor the other tests are touched; its result is
reported here under its own name.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from host_compiler import build_host_driver, compile_on_host

from maskcast.engines.tensorrt.plugins.library import FOLDER as PLUGINS
from maskcast.engines.tensorrt.plugins.library import Kernels

RESULTS = "MASKCAST_HOST_GPU_RESULTS"
"""Set in the child: the file to which it writes its tests' reports, one JSON object per line."""


class HostKernels(Kernels):
    """The project's CUDA kernels, compiled for the host, on host memory."""

    def order(self, *, backwards: bool) -> None:
        """Choose the order in which threads and blocks run."""
        self._library.host_backwards(int(backwards))


@pytest.fixture(scope="session")
def host_kernels(tmp_path_factory: pytest.TempPathFactory) -> HostKernels:
    library = tmp_path_factory.mktemp("kernels") / "libkernels.so"
    sources = ("kernels.cpp", "host_launch.cpp", PLUGINS / "functions.cpp")
    return HostKernels(compile_on_host(library, *sources))


ALIVE = (
    "device allocations",
    "pinned allocations",
    "streams",
    "events",
    "graphs",
    "contexts",
    "pending",
)


class HostDriver:
    """The host driver's interface for tests: what exists and what went wrong."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL("libcuda.so.1")
        self._library.host_driver_report.restype = ctypes.c_char_p

    def report(self) -> dict[str, int]:
        """Count the objects that exist, the launches and the bytes copied."""
        lines = [line for line in self._lines() if not line.startswith("fault: ")]
        return {name: int(count) for name, count in (line.rsplit(": ", 1) for line in lines)}

    def faults(self) -> list[str]:
        """List what a real driver would have tolerated or reported late."""
        return [line[7:] for line in self._lines() if line.startswith("fault: ")]

    def break_down(self, status: int = 700) -> None:
        """Fail every call from now on: 700 is an illegal address, 0 ends the failures."""
        self._library.host_driver_break(status)

    def blocking_events(self, *, blocking: bool) -> int:
        """Count the events whose waiters block, or those whose waiters spin."""
        return int(self._library.host_driver_blocking_events(int(blocking)))

    def refuse_capture(self) -> None:
        """Refuse to capture streams in CUDA graphs."""
        self._library.host_driver_refuse_capture(1)

    def set_version(self, version: int) -> None:
        """Report support of another CUDA version: 12040 is 12.4."""
        self._library.host_driver_version(version)

    def reset(self) -> None:
        self._library.host_driver_reset()

    def _lines(self) -> list[str]:
        return str(self._library.host_driver_report().decode()).splitlines()


@pytest.fixture
def host_driver() -> Iterator[HostDriver]:
    """Yield the host driver; after the test, check that it has no faults and no leftovers."""
    driver = HostDriver()
    driver.reset()
    yield driver
    report = driver.report()
    assert driver.faults() == []
    assert {name: n for name in ALIVE if (n := report[name])} == {}, "left over on the device"


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "host_gpu: runs in a child process on the host driver")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if path := os.environ.get(RESULTS):
        line = json.dumps(report._to_json(), default=str)
        with Path(path).open("a") as results:
            results.write(line + "\n")


def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    if item.get_closest_marker("host_gpu") is None or RESULTS in os.environ:
        return None
    hook = item.ihook
    hook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for report in _reports(item):
        hook.pytest_runtest_logreport(report=report)
    hook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    # The test before this one kept the fixtures that it expected this one to share.
    item.session._setupstate.teardown_exact(nextitem)
    return True


_results: dict[str, list[Any]] = {}
_ends: dict[Path, str] = {}
"""How the child ended, by each file that it ran."""


def _reports(item: pytest.Item) -> list[pytest.TestReport]:
    """Return a test's reports from the child, which runs all marked files of the session."""
    reason = _missing()
    if reason:
        skip = (str(item.path), item.location[1] or 0, f"Skipped: {reason}")
        return [_report(item, "skipped", skip)]
    if item.path not in _ends:
        _run_child(item)
    found = _results.get(item.nodeid)
    if not found:
        return [_report(item, "failed", f"the child process died\n{_ends[item.path]}")]
    return [pytest.TestReport._from_json(one) for one in found]


def _report(item: pytest.Item, outcome: Any, text: Any) -> pytest.TestReport:
    return pytest.TestReport(item.nodeid, item.location, {}, outcome, text, "call")


def _missing() -> str | None:
    if importlib.util.find_spec("pycuda") is None:
        return "pycuda is not installed"
    if shutil.which("g++") is None or shutil.which("nm") is None:
        return "g++ and nm are needed to build the host driver"
    return None


def _run_child(item: pytest.Item) -> None:
    folder = item.config._tmp_path_factory.mktemp("host_gpu")  # type: ignore[attr-defined]
    build_host_driver(folder)
    results = folder / "results.jsonl"
    environment = {**os.environ, RESULTS: str(results), "LD_LIBRARY_PATH": str(folder)}
    marked = (one for one in item.session.items if one.get_closest_marker("host_gpu"))
    paths = sorted({one.path for one in marked})
    command = [sys.executable, "-m", "pytest", *map(str, paths), "-q", "-m", "host_gpu"]
    command += ["-p", "no:cacheprovider", f"--rootdir={item.config.rootpath}"]
    done = subprocess.run(
        command, cwd=item.config.rootpath, env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    end = f"exit status {done.returncode}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
    _ends.update(dict.fromkeys(paths, end))
    for line in results.read_text().splitlines() if results.exists() else []:
        report = json.loads(line)
        _results.setdefault(report["nodeid"], []).append(report)
