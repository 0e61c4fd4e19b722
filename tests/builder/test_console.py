from __future__ import annotations

import io

from rich.console import Console

from maskcast.builder.console import build_progress


def test_steps_are_shown_on_a_terminal_only():
    for is_terminal in (True, False):
        output = io.StringIO()
        console = Console(file=output, force_terminal=is_terminal, width=80)
        with build_progress(console) as report:
            report("exporting the detector", 0, 0)
        assert ("exporting the detector" in output.getvalue()) == is_terminal
        assert is_terminal or output.getvalue() == ""
