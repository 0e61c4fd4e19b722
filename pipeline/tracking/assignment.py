"""Assignment: pairs rows and columns of a matrix with the greatest sum."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def best_pairs(gain: NDArray[np.float64]) -> list[tuple[int, int]]:
    """Pair rows with columns so that the sum of the gains is the greatest possible.

    A row or column may stay unpaired; a pair whose gain is 0 or less is never made. Pairs without
    an alternative, which are nearly all, are found at once. The others are found by shortest
    augmenting paths (Jonker and Volgenant 1987), separately in each connected group of rows and
    columns.

    Args:
        gain: ``[A, B]`` float64, finite.

    Returns:
        Pairs of row and column, sorted by row.
    """
    possible = gain > 0
    per_row, per_column = possible.sum(axis=1), possible.sum(axis=0)
    row, column = np.nonzero(possible)
    alone = (per_row[row] == 1) & (per_column[column] == 1)
    pairs = list(zip(row[alone].tolist(), column[alone].tolist(), strict=True))
    for rows, columns in _groups(row[~alone].tolist(), column[~alone].tolist()):
        for i, j in _solve(np.maximum(gain[np.ix_(rows, columns)], 0)):
            if possible[rows[i], columns[j]]:
                pairs.append((rows[i], columns[j]))
    return sorted(pairs)


def _groups(row: list[int], column: list[int]) -> list[tuple[list[int], list[int]]]:
    """Split the edges of a graph between rows and columns into its connected parts."""
    of_row: dict[int, list[int]] = {}
    of_column: dict[int, list[int]] = {}
    for i, j in zip(row, column, strict=True):
        of_row.setdefault(i, []).append(j)
        of_column.setdefault(j, []).append(i)
    groups = []
    while of_row:
        rows, columns = {next(iter(of_row))}, set[int]()
        new = rows
        while new:
            met = {j for i in new for j in of_row.pop(i)} - columns
            columns |= met
            new = {i for j in met for i in of_column[j]} - rows
            rows |= new
        groups.append((sorted(rows), sorted(columns)))
    return groups


def _solve(gain: NDArray[np.float64]) -> list[tuple[int, int]]:
    """Solve one group: pair every row, or every column if there are fewer; no gain is negative."""
    if gain.shape[0] > gain.shape[1]:
        return [(i, j) for j, i in _solve(gain.T)]
    cost = gain.max() - gain
    rows, columns = cost.shape
    row_price, column_price = cost.min(axis=1), np.zeros(columns)
    row_of = np.full(columns, -1)
    column_of = np.full(rows, -1)
    for i, j in enumerate(cost.argmin(axis=1).tolist()):
        if row_of[j] < 0:
            row_of[j], column_of[i] = i, j
    for start in np.flatnonzero(column_of < 0).tolist():
        distance = np.full(columns, np.inf)
        before = np.full(columns, -1)
        is_done = np.zeros(columns, np.bool_)
        i, reached, done_rows = start, 0.0, [start]
        while True:
            through = reached + cost[i] - row_price[i] - column_price
            shorter = ~is_done & (through < distance)
            distance[shorter], before[shorter] = through[shorter], i
            j = int(np.where(is_done, np.inf, distance).argmin())
            reached = float(distance[j])
            is_done[j] = True
            if row_of[j] < 0:
                break
            i = int(row_of[j])
            done_rows.append(i)
        # Update the prices so that all reduced costs stay 0 or more.
        for i in done_rows:
            row_price[i] += reached - (0.0 if i == start else distance[column_of[i]])
        column_price[is_done] -= reached - distance[is_done]
        while True:  # back along the path: each row takes the column that was reached from it
            i = int(before[j])
            row_of[j] = i
            j, column_of[i] = int(column_of[i]), j
            if i == start:
                break
    return [(i, int(j)) for i, j in enumerate(column_of.tolist())]
