"""The cheapest one-to-one assignment: scipy's where scipy is installed, else the same algorithm in NumPy."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


def assignment(cost: NDArray[np.float64]) -> NDArray[np.intp]:
    """The column of every row in the assignment of least total cost, for a square and finite cost matrix (n, n)."""
    try:
        from scipy.optimize import linear_sum_assignment
    except ModuleNotFoundError:
        return augmenting_paths(cost)
    columns: NDArray[np.intp] = linear_sum_assignment(cost)[1]
    return columns


def augmenting_paths(cost: NDArray[np.float64]) -> NDArray[np.intp]:
    """Shortest augmenting paths (Crouse 2016, IEEE Trans. Aerospace and Electronic Systems 52(4)), O(n^3).

    A monitor measures exact distances of 128 points by default, and must do so where only torch and NumPy are
    installed: there a distance takes some 10 ms instead of 1.
    """
    n = len(cost)
    row_price, column_price = np.zeros(n), np.zeros(n)
    column_of, row_of = np.full(n, -1), np.full(n, -1)
    for start in range(n):
        distance, parent, done = np.full(n, np.inf), np.full(n, -1), np.zeros(n, dtype=bool)
        row, reached, rows = start, 0.0, []
        while True:
            rows.append(row)
            through = reached + cost[row] - row_price[row] - column_price
            shorter = ~done & (through < distance)
            distance[shorter], parent[shorter] = through[shorter], row
            column = int(np.where(done, np.inf, distance).argmin())
            reached, done[column] = distance[column], True
            if row_of[column] < 0:
                break
            row = int(row_of[column])
        row_price[start] += reached
        others = rows[1:]
        row_price[others] += reached - distance[column_of[others]]
        column_price[done] -= reached - distance[done]
        while True:
            row = int(parent[column])
            row_of[column] = row
            column_of[row], column = column, int(column_of[row])
            if row == start:
                break
    return column_of
