"""The kinds of groups that a limit on data parallelism leaves, and how far they are apart.

A *type* says how many devices of each class a group has.  Where far devices can't share a group
there are few types, and a placement is a path over types with repeats::

    classes a b c (2 devices of each), groups of 2, a and b close, c far
    types:  aa  ab  bb  cc            not: ac  bc
    path:   ab  ab  cc

Classes that can take each other's place (an *orbit*: equal nodes of a region) would give as many
copies of a type; of these only the one whose counts fall within each orbit is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from ray_train_geo.planning.dtfm_classes import ClassProblem, Group

__all__ = ["as_group", "excess_between", "group_types"]

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

_STEPS_PER_TYPE = 100
"""Enumeration gives up after this many steps for each type that it may find."""


def as_group(counts: Sequence[int]) -> Group:
    """The group that has ``counts[c]`` devices of class c."""
    return tuple(c for c, count in enumerate(counts) for _ in range(count))


def group_types(problem: ClassProblem, high_s: float, limit: int) -> Ints | None:
    """``[types, classes]``: all types, up to orbits, whose data parallelism is within ``high_s``.

    Returns:
        None if there are more than ``limit``.
    """
    classes = len(problem.sizes)
    before = {d: c for orbit in problem.orbits for c, d in pairwise(orbit)}
    room_after = np.append(np.cumsum(problem.sizes[::-1])[::-1], 0)
    own_s = np.diag(problem.sync_s)
    found: list[list[int]] = []
    # Depth first over the classes; a device more never makes an exchange cheaper, so prune early.
    stack: list[tuple[list[int], int, Floats]] = [([], problem.replicas, np.zeros(classes))]
    steps = 0
    while stack:
        counts, left, exchange_s = stack.pop()
        c = len(counts)
        if left == 0:
            found.append(counts + [0] * (classes - c))
        if len(found) > limit or steps > _STEPS_PER_TYPE * limit:
            return None
        if left == 0 or c == classes:
            continue
        most = min(left, problem.sizes[c], counts[before[c]] if c in before else left)
        present = np.flatnonzero(counts)
        for count in range(max(0, left - int(room_after[c + 1])), most + 1):
            steps += 1
            total_s = exchange_s + count * problem.sync_s[c]
            inside = np.append(present, c) if count else present
            if (total_s[inside] - own_s[inside] > high_s).any():
                break  # nor can there be more of it
            stack.append(([*counts, count], left - count, total_s))
    return np.array(found, dtype=np.int64).reshape(-1, classes)


def excess_between(problem: ClassProblem, types: Ints, most_s: float) -> Floats:
    """``[types, types]``: how much slower than the fastest a hop is; infinite above ``most_s``.

    On the diagonal: a hop between two groups of the type, infinite if there can't be two.
    """
    least_s = problem.least_hop_s()
    hop_s = np.where(problem.usable, problem.hop_s, np.inf)
    groups = [as_group(counts) for counts in types]
    # A hop is at least as slow as any device's hop to its closest partner: few pairs need more.
    closest_s = np.array([hop_s[:, sorted(set(group))].min(axis=1) for group in groups])
    bound_s = np.array([closest_s[:, sorted(set(group))].max(axis=1) for group in groups])
    bound_s = np.maximum(bound_s, bound_s.T) - least_s
    excess_s = np.full(bound_s.shape, np.inf)
    for i, j in np.argwhere(np.triu(bound_s <= most_s)):
        hop = problem.bottleneck_s(groups[i], groups[j])
        excess_s[i, j] = excess_s[j, i] = max(0.0, hop - least_s)
    once = (2 * types > np.array(problem.sizes)).any(axis=1)
    excess_s[once, once] = np.inf
    return np.where(excess_s <= most_s, excess_s, np.inf)
