"""Which regions are near each other: an order to walk them in, and islands at every distance."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ray_train_geo.planning.link_table import Floats
from ray_train_geo.planning.problem import Problem

__all__ = ["distances_s", "islands", "walk"]


def distances_s(problem: Problem) -> Floats:
    """``[regions, regions]``; seconds for a message there and one back, and 0 on the diagonal.

    A region is as far as its first device.
    """
    table = problem.table
    regions = len(table.regions)
    first = [int(np.flatnonzero(table.region == r)[0]) for r in range(regions)]
    size = problem.message_bytes
    away = np.zeros((regions, regions))
    for i in range(regions):
        for j in range(regions):
            if i != j:
                latency, per_byte = problem.hop(first[i], first[j])
                away[i, j] = latency + size * per_byte
    both: Floats = away + away.T
    return both


def walk(away: Floats) -> list[int]:
    """A short path through all regions: nearest neighbours from the best start, then 2-opt."""
    count = len(away)
    best: list[int] = []
    best_s = np.inf
    for start in range(count):
        path, left = [start], set(range(count)) - {start}
        while left:
            here = path[-1]
            nearest = min(left, key=lambda r: (away[here, r], r))
            path.append(nearest)
            left.remove(nearest)
        length = _length(away, path)
        if length < best_s:
            best, best_s = path, length
    improved = True
    while improved:
        improved = False
        for i in range(count - 1):
            for j in range(i + 1, count):
                path = [*best[:i], *reversed(best[i : j + 1]), *best[j + 1 :]]
                length = _length(away, path)
                if length < best_s * (1 - 1e-9):
                    best, best_s, improved = path, length, True
    return best


def _length(away: Floats, path: Sequence[int]) -> float:
    return float(away[path[:-1], path[1:]].sum())


def islands(away: Floats, path: Sequence[int]) -> list[list[list[int]]]:
    """All partitions of single-linkage clustering, from every region alone to all together.

    Within an island, and among islands, regions stand in the order of ``path``.
    """
    place = {r: i for i, r in enumerate(path)}
    parts = [[r] for r in path]
    found = [[list(p) for p in parts]]
    for limit in np.unique(away[np.triu_indices(len(away), 1)]):
        merged: list[list[int]] = []
        for part in parts:
            near = [m for m in merged if away[np.ix_(m, part)].min() <= limit]
            apart = [m for m in merged if m not in near]
            merged = [*apart, sorted((r for m in [*near, part] for r in m), key=place.__getitem__)]
        merged.sort(key=lambda m: place[m[0]])
        if len(merged) < len(parts):
            parts = merged
            found.append([list(p) for p in parts])
    return found
