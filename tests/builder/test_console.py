from __future__ import annotations

import io

import pytest
from rich.console import Console

from maskcast.builder.console import build_progress, print_scores


def test_steps_are_shown_on_a_terminal_only():
    for is_terminal in (True, False):
        output = io.StringIO()
        console = Console(file=output, force_terminal=is_terminal, width=80)
        with build_progress(console) as report:
            report("exporting the detector", 0, 0)
        assert ("exporting the detector" in output.getvalue()) == is_terminal
        assert is_terminal or output.getvalue() == ""


def test_scores_of_keypoints_have_none_for_small_people(capsys: pytest.CaptureFixture[str]):
    names = ("AP", "AP50", "AP75", "APs", "APm", "APl")
    boxes = dict(zip(names, (0.1, 0.2, 0.3, 0.4, 0.5, 0.6), strict=True))
    scores = {
        "images": 7,
        "bbox": boxes,
        "keypoints": {name: value + 0.01 for name, value in boxes.items() if name != "APs"},
        "at_threshold": {"threshold": 0.8, "precision": 1, "recall": 1, "false_per_image": 0},
    }
    print_scores(scores)
    printed = capsys.readouterr().out.splitlines()
    (row,) = (line for line in printed if "keypoints" in line)
    assert [cell.strip() for cell in row.split("│")[2:-1]] == [
        "11.0",
        "21.0",
        "31.0",
        "-",
        "51.0",
        "61.0",
    ]
