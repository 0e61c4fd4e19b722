from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from benchmarks.suite import RESULTS, ROOT, SEED

MODULE = """
import pytest

@pytest.mark.parametrize("number", range(12))
def test_a_number(number):
    assert number != {wrong}

@pytest.fixture
def broken():
    raise ValueError

def test_with_a_fixture(broken):
    pass
"""


def outcomes(folder: Path, seed: int) -> list[str]:
    results = folder / "results"
    results.unlink(missing_ok=True)
    environment = os.environ | {
        SEED: str(seed),
        RESULTS: str(results),
        "PYTHONPATH": str(ROOT),
        "PYTEST_ADDOPTS": "-p benchmarks.suite",
    }
    command = [sys.executable, "-m", "pytest", "-q", "--rootdir", str(folder), str(folder)]
    subprocess.run(command, cwd=folder, env=environment, capture_output=True, check=False)
    return results.read_text().splitlines()


def test_every_test_runs_once_in_an_order_that_the_seed_decides(tmp_path: Path) -> None:
    for name, wrong in (("one", 3), ("two", -1)):
        (tmp_path / f"test_{name}.py").write_text(MODULE.format(wrong=wrong))
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    first, again, other = (outcomes(tmp_path, seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert sorted(first) == sorted(other)
    assert len(first) == 2 * 13
    failed = [line for line in first if line.startswith("failed ")]
    assert sorted(failed) == [
        "failed test_one.py::test_a_number[3]",
        "failed test_one.py::test_with_a_fixture",
        "failed test_two.py::test_with_a_fixture",
    ]
    modules = [line.split()[1].partition("::")[0] for line in first]
    assert modules in (sorted(modules), sorted(modules, reverse=True)), "a module stays together"
