"""Pair two groups of devices so that the slowest pair is as fast as possible."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_flow

__all__ = ["bottleneck_flow", "bottleneck_matching"]

Floats = NDArray[np.float64]


def bottleneck_matching(weights: Floats) -> tuple[float, tuple[int, ...]]:
    """The perfect matching of ``weights [n, n]`` whose largest weight is least.

    Rows are matched one after the other over edges up to a threshold.  A row that finds no
    augmenting path proves the threshold too low; the lightest edge that leaves the rows and columns
    that it reached is the least that can help (the threshold method; Burkard, Dell'Amico and
    Martello, "Assignment Problems", section 6.2).

    Returns:
        The largest weight, and the column of each row.
    """
    size = len(weights)
    threshold = float(max(weights.min(axis=1).max(), weights.min(axis=0).max()))
    edges = _masks(weights, threshold)
    row_of, column_of = [-1] * size, [-1] * size
    for row in range(size):
        reached, free = _search(edges, row_of, row)
        while free is None:
            # Only an edge that leaves what was reached can help.
            rows = [row, *(row_of[column] for column in reached)]
            unseen = [column for column in range(size) if column not in reached]
            threshold = float(weights[np.ix_(rows, unseen)].min())
            edges = _masks(weights, threshold)
            reached, free = _search(edges, row_of, row)
        column = free
        while column != -1:  # turn the path over, from its free column back to the row
            owner = reached[column]
            row_of[column], column_of[owner], column = owner, column, column_of[owner]
    return threshold, tuple(column_of)


def bottleneck_flow(weights: Floats, rows: Sequence[int], columns: Sequence[int]) -> float:
    """The largest weight of the best perfect matching, of rows and columns that repeat.

    Args:
        weights: ``[kinds of rows, kinds of columns]``.
        rows, columns: how often each kind occurs; both add up to the same.
    """
    levels = np.unique(weights)
    low, high = 0, len(levels) - 1
    while low < high:  # the least level over whose edges all rows flow to all columns
        middle = (low + high) // 2
        if _flows(weights <= levels[middle], rows, columns):
            high = middle
        else:
            low = middle + 1
    return float(levels[low])


def _flows(edges: NDArray[np.bool_], rows: Sequence[int], columns: Sequence[int]) -> bool:
    sink = 1 + len(rows) + len(columns)
    capacity = np.zeros((sink + 1, sink + 1), dtype=np.int32)
    capacity[0, 1 : 1 + len(rows)] = rows
    capacity[1 : 1 + len(rows), 1 + len(rows) : sink] = edges * sum(rows)
    capacity[1 + len(rows) : sink, sink] = columns
    return int(maximum_flow(csr_array(capacity), 0, sink).flow_value) == sum(rows)


def _masks(weights: Floats, threshold: float) -> list[int]:
    """For each row, the columns within ``threshold``, as bits."""
    packed = np.packbits(weights <= threshold, axis=1, bitorder="little")
    return [int.from_bytes(row.tobytes(), "little") for row in packed]


def _search(edges: list[int], row_of: list[int], start: int) -> tuple[dict[int, int], int | None]:
    """Breadth-first over alternating paths: each reached column's row, and a free column."""
    reached: dict[int, int] = {}
    seen = 0
    queue = [start]
    for row in queue:
        fresh = edges[row] & ~seen
        seen |= fresh
        while fresh:
            column = (fresh & -fresh).bit_length() - 1
            fresh &= fresh - 1
            reached[column] = row
            if row_of[column] < 0:
                return reached, column
            queue.append(row_of[column])
    return reached, None
