"""The cheapest open path over a few points."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

__all__ = ["path_length", "shortest_path"]

Floats = NDArray[np.float64]
Order = tuple[int, ...]

_EXACT_POINTS = 16


def path_length(weights: Floats, order: Order) -> float:
    """The sum of ``weights [n, n]`` over the steps of ``order``."""
    return float(sum(weights[a, b] for a, b in pairwise(order)))


def shortest_path(weights: Floats) -> Order:
    """The order of all points of symmetric ``weights [n, n]`` whose steps add up to least.

    Exact up to 16 points.  Of more: the better of the order as given and of nearest neighbours,
    each improved until reversing no part of it helps (2-opt).
    """
    count = len(weights)
    if count <= _EXACT_POINTS:
        return _held_karp(weights)
    starts = tuple(range(count)), _nearest_neighbours(weights)
    return min(
        (_two_opt(weights, s) for s in starts), key=lambda order: path_length(weights, order)
    )


def _held_karp(weights: Floats) -> Order:
    """Dynamic programming over sets of visited points (Held and Karp, 1962)."""
    count = len(weights)
    points = np.arange(count)
    subsets = np.arange(1 << count)
    visits = subsets[:, None] >> points & 1
    sizes = visits.sum(axis=1)
    # best[visited, last]: the cheapest path over the points of the bit set that ends in `last`.
    best = np.full((1 << count, count), np.inf)
    best[1 << points, points] = 0.0
    for size in range(1, count):
        layer = subsets[sizes == size]
        for point in range(count):
            without = layer[visits[layer, point] == 0]
            best[without | 1 << point, point] = (best[without] + weights[:, point]).min(axis=1)
    visited = (1 << count) - 1
    last = int(best[visited].argmin())
    order = [last]
    while len(order) < count:
        visited ^= 1 << last
        last = int((best[visited] + weights[:, last]).argmin())
        order.append(last)
    return tuple(order)


def _nearest_neighbours(weights: Floats) -> Order:
    left = set(range(1, len(weights)))
    order = [0]
    while left:
        order.append(min(left, key=lambda point: (weights[order[-1], point], point)))
        left.remove(order[-1])
    return tuple(order)


def _two_opt(weights: Floats, start: Order) -> Order:
    """Reverse parts of the path while that helps, best first."""
    order = np.array(start)
    count = len(order)
    first, last = np.triu_indices(count, 1)
    while True:
        # Reversing order[first..last] replaces the steps into it and out of it.
        before, after = order[np.maximum(first - 1, 0)], order[np.minimum(last + 1, count - 1)]
        head, tail = order[first], order[last]
        into = np.where(first > 0, weights[before, tail] - weights[before, head], 0.0)
        out = np.where(last < count - 1, weights[head, after] - weights[tail, after], 0.0)
        best = int((into + out).argmin())
        gain = into[best] + out[best]
        if gain >= -1e-12 * abs(weights).max():
            return tuple(map(int, order))
        a, b = first[best], last[best] + 1
        order[a:b] = order[a:b][::-1].copy()
