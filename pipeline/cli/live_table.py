"""LiveTable: what is going on, for the person at the terminal."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TimeRemainingColumn
from rich.table import Table

PLAIN_EVERY_S = 5.0
"""Time between two reports where there is no terminal."""


class LiveTable:
    """A table on stderr that is drawn anew in place, with a bar where the end is known.

    Where stderr is no terminal, the same figures come as plain lines: every ``PLAIN_EVERY_S``
    seconds, and the last ones at the end.

    Args:
        title: stands above the table, or once in front of the lines.
        columns: the headings; the first column names the row.
    """

    def __init__(self, title: str, columns: Sequence[str]) -> None:
        self._title = title
        self._columns = columns
        self._rows: Sequence[Sequence[str]] = ()
        self._caption = ""
        self._progress = Progress(
            BarColumn(bar_width=40),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._task: TaskID | None = None
        self._console = self._progress.console
        self._live: Live | None = None
        self._next_plain_s = 0.0

    def __enter__(self) -> Self:
        self._next_plain_s = time.monotonic() + PLAIN_EVERY_S
        return self

    def show(
        self,
        rows: Sequence[Sequence[str]],
        *,
        caption: str = "",
        done: int = 0,
        total: int | None = None,
    ) -> None:
        """Show new figures.

        Args:
            rows: one text for each column.
            caption: a line below the table.
            done: how much of the work is done.
            total: how much there is to do; without it there is no bar.
        """
        self._rows, self._caption = rows, caption
        if total is not None:
            if self._task is None:
                self._task = self._progress.add_task("", total=total)
            self._progress.update(self._task, completed=min(done, total), total=total)
        if self._console.is_terminal:
            if self._live is None:
                self._live = Live(console=self._console, auto_refresh=False)
                self._live.start()
            self._live.update(self._render(), refresh=True)
        elif time.monotonic() >= self._next_plain_s:
            self._next_plain_s = time.monotonic() + PLAIN_EVERY_S
            self._print_plain()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()
        elif kind in (None, SystemExit):  # an error shall be the last line, and the only one
            self._print_plain()

    def _render(self) -> Group:
        table = Table(title=self._title, title_justify="left", caption_justify="left")
        table.caption = self._caption or None
        for number, column in enumerate(self._columns):
            table.add_column(column, justify="right" if number else "left", no_wrap=not number)
        for row in self._rows:
            table.add_row(*row)
        return Group(table, self._progress) if self._task is not None else Group(table)

    def _print_plain(self) -> None:
        if self._rows and self._title:
            self._console.print(self._title, soft_wrap=True, highlight=False, markup=False)
            self._title = ""
        for name, *values in self._rows:
            figures = ", ".join(
                f"{column} {value}"
                for column, value in zip(self._columns[1:], values, strict=True)
                if value
            )
            self._console.print(f"{name}: {figures}", soft_wrap=True, highlight=False, markup=False)
