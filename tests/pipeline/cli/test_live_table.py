import re

import pytest

from maskcast.pipeline.cli import live_table
from maskcast.pipeline.cli.live_table import LiveTable
from maskcast.pipeline.cli.run import COLUMNS, WIDE_ONLY

PROBLEM = "reconnecting: no answer within 10 s, and this is the rest of a long reason " * 4


@pytest.fixture
def plain(monkeypatch) -> None:
    """Let every call of ``show`` print."""
    monkeypatch.setattr(live_table, "PLAIN_EVERY_S", 0.0)


@pytest.mark.parametrize(("width", "headings"), [(60, 6), (80, 7), (160, 7)])
def test_a_row_is_one_line_however_long_its_text(
    width: int, headings: int, monkeypatch, capsys
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("FORCE_COLOR", "1")
    rows = [
        ["front-door-of-the-warehouse", "123456", "120000", "3456", "29.9", "1234", PROBLEM],
        ["[bold]", "1", "1", "0", "", "", "person 1"],
    ]
    with LiveTable("model on CPU", COLUMNS, WIDE_ONLY) as table:
        table.show(rows)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().err)
    lines = text[text.rindex("model on CPU") :].splitlines()
    assert all(len(line) <= width for line in lines), lines
    *heads, _, door, other = (line for line in lines[1:] if line.strip())
    assert len(heads[-1].split()) == headings
    assert "120000" in door
    assert "reconnecting:" in door
    assert door.rstrip().endswith("…")
    assert "[bold]" in other


def test_a_line_that_has_not_changed_is_not_repeated(plain, capsys) -> None:
    with LiveTable("model on CPU", ("source", "processed", "now")) as table:
        for count in (1, 2, 2, 3):
            table.show([["clip", "2", "ended: end of stream"], ["door", str(count), "person 1"]])
    assert capsys.readouterr().err.splitlines() == [
        "model on CPU",
        "clip: processed 2, now ended: end of stream",
        "door: processed 1, now person 1",
        "door: processed 2, now person 1",
        "door: processed 3, now person 1",
    ]


@pytest.mark.parametrize("done", [0, 3])
def test_after_an_error_only_figures_of_work_that_was_done_are_printed(done: int, capsys) -> None:
    def fail() -> None:
        with LiveTable("", ("source", "processed", "now")) as table:
            table.show([["clip", str(done), "ended: failed"]], done=done)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    errors = capsys.readouterr().err
    assert errors == ("clip: processed 3, now ended: failed\n" if done else "")
