"""LiveTable: current figures on stderr, as a table or as plain lines."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

PLAIN_EVERY_S = 5.0
"""Seconds between two reports if stderr is not a terminal."""

WIDE = 76
"""Minimum width of a terminal, in columns, for all columns of the table."""

_PADDED = 100
"""Minimum width of a terminal, in columns, for a space between the columns of the table."""

_LAST_WIDTH = 14


class LiveTable:
    """A table on stderr that is updated in place, with a progress bar if the total is known.

    Every row is one line of the terminal: the last column is cut if it does not fit.

    If stderr is not a terminal, the same figures are printed as plain lines, every
    ``PLAIN_EVERY_S`` seconds and at the end; a line that has not changed is not repeated. If an
    error occurs before any work is done, no figures are printed, so that the error is the only
    line.

    Args:
        title: printed above the table, or once before the lines.
        columns: the headings; the first column names the row, the last one is a text.
        wide_only: columns that a terminal of less than ``WIDE`` columns does not show.
    """

    def __init__(self, title: str, columns: Sequence[str], wide_only: Sequence[str] = ()) -> None:
        self._title = title
        self._columns = columns
        self._wide_only = wide_only
        self._rows: Sequence[Sequence[str]] = ()
        self._printed: dict[str, str] = {}
        self._caption = ""
        self._has_done = False
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
        self._has_done = done > 0
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
        elif self._has_done or kind in (None, SystemExit):
            self._print_plain()

    def _render(self) -> Group:
        width = self._console.width
        table = Table(
            title=self._title,
            title_justify="left",
            caption=self._caption or None,
            caption_justify="left",
            box=box.SIMPLE_HEAD,
            show_edge=False,
            padding=(0, 1 if width >= _PADDED else 0, 0, 0),
        )
        hidden = self._wide_only if width < WIDE else ()
        shown = [index for index, column in enumerate(self._columns) if column not in hidden]
        name, *figures, last = (self._columns[index] for index in shown)
        table.add_column(name, no_wrap=True, max_width=width // 5)
        for column in figures:
            table.add_column(column.replace(" ", "\n"), justify="right", no_wrap=True)
        table.add_column(last, min_width=_LAST_WIDTH)
        for row in self._rows:
            *cells, text = (row[index] for index in shown)
            table.add_row(*map(Text, cells), Text(text, no_wrap=True, overflow="ellipsis"))
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
            if self._printed.get(name) != figures:
                self._printed[name] = figures
                line = f"{name}: {figures}"
                self._console.print(line, soft_wrap=True, highlight=False, markup=False)
