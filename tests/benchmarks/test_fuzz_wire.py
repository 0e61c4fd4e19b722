import json
import subprocess
import sys
from pathlib import Path

import pytest

from maskcast.pipeline.wire.message import decode

ROOT = Path(__file__).parents[2]


@pytest.fixture
def fuzz_wire(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks import fuzz_wire

    return fuzz_wire


def test_ten_thousand_wrong_messages_are_messages_or_wire_errors_and_leave_no_memory(fuzz_wire):
    outcome = fuzz_wire.fuzz(10_000, seed=1)
    assert outcome.messages + outcome.refused == 10_000
    assert outcome.messages > 500
    assert outcome.refused > 5000
    assert outcome.peak_growth_mb < 50


def test_any_other_error_comes_out_with_its_case(fuzz_wire):
    def careless(parts):
        return decode(parts) if len(parts) > 1 else parts[1]

    with pytest.raises(IndexError) as caught:
        fuzz_wire.fuzz(10_000, seed=1, read=careless)
    (note,) = caught.value.__notes__
    assert note.startswith("case ")


def test_the_same_seed_gives_the_same_cases(fuzz_wire):
    first, second, other = (fuzz_wire.Mutator(seed) for seed in (3, 3, 4))
    cases = [first.case() for _ in range(100)]
    assert cases == [second.case() for _ in range(100)]
    assert cases != [other.case() for _ in range(100)]


def test_the_command_prints_what_came_of_it():
    command = [sys.executable, "-m", "benchmarks.fuzz_wire", "--cases", "200", "--json"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    printed = json.loads(result.stdout)
    assert printed["cases"] == printed["messages"] + printed["refused"] == 200
