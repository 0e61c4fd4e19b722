"""Run all tests in random order while other processes are busy, and report those that fail.

Run: ``python -m benchmarks.suite [--rounds 20] [--hogs 2] [--seed 0]`` after ``make test``. Each
round runs all groups of tests at once, as ``make test`` does, with the modules and the tests in
them shuffled; pytest then moves those together that share a costly fixture. Round n has the seed
``seed + n``, so that it can be repeated alone. The output of failed tests is printed. The exit code
is 1 if a test failed or a group did not end properly.

pytest also loads this file, as the plugin that shuffles the tests and writes down their results.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import pytest

from benchmarks.busy import busy_processes

ROOT = Path(__file__).parents[1]
GROUPS = ("test-pipeline", "test-commands", "test-engines", "test-builder")
SEED, RESULTS = "MASKCAST_SUITE_SEED", "MASKCAST_SUITE_RESULTS"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Shuffle the modules and the tests in each."""
    order = random.Random(int(os.environ[SEED]))
    modules: dict[Path, list[pytest.Item]] = {}
    for item in items:
        modules.setdefault(item.path, []).append(item)
    paths = list(modules)
    order.shuffle(paths)
    for tests in modules.values():
        order.shuffle(tests)
    items[:] = [item for path in paths for item in modules[path]]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Write one line for each test that has run or failed."""
    if report.failed or report.when == "call":
        with Path(os.environ[RESULTS]).open("a") as results:
            results.write(f"{report.outcome} {report.nodeid}\n")


def run_round(seed: int) -> tuple[Counter[str], list[str], bool]:
    """Run all tests once.

    Returns:
        The number of tests by outcome, the names of those that failed, and whether all groups ended
        as they should.
    """
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results"
        results.touch()
        environment = os.environ | {
            SEED: str(seed),
            RESULTS: str(results),
            "PYTHONPATH": str(ROOT),
            "PYTEST_ADDOPTS": "-p benchmarks.suite --tb=short -q",
        }
        make = ["make", "--no-print-directory", "--jobs=4", "--keep-going", *GROUPS]
        done = subprocess.run(
            make, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=False
        )
        outcomes = [line.split(maxsplit=1) for line in results.read_text().splitlines()]
    if done.returncode:
        print(done.stdout)
    failed = [name for outcome, name in outcomes if outcome == "failed"]
    return Counter(outcome for outcome, _ in outcomes), failed, done.returncode == 0


def main() -> None:
    """Run the rounds and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--hogs", type=int, default=2, help="busy processes")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    is_good = True
    with busy_processes(options.hogs):
        for seed in range(options.seed, options.seed + options.rounds):
            began_s = time.monotonic()
            counts, failed, has_ended = run_round(seed)
            minutes = (time.monotonic() - began_s) / 60
            print(
                f"seed {seed}: {counts['passed']} passed, {len(failed)} failed, {minutes:.0f} min",
                flush=True,
            )
            for name in failed:
                print(f"  {name}", flush=True)
            is_good = is_good and has_ended and not failed
    sys.exit(not is_good)


if __name__ == "__main__":
    main()
