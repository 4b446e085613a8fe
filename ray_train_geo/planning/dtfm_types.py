"""The kinds of groups that a limit on data parallelism leaves, and how far they are apart.

A *type* says how many devices of each site a group has.  Where far devices can't share a group
there are few types, and a placement is a path over types with repeats::

    sites a b c (2 devices of each), groups of 2, a and b close, c far
    types:  aa  ab  bb  cc            not: ac  bc
    path:   ab  ab  cc
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ray_train_geo.planning.dtfm_classes import ClassProblem
from ray_train_geo.planning.dtfm_sites import Site, Spread

__all__ = ["Types", "as_group", "excess_between", "group_types"]

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

_STEPS_PER_TYPE = 100
"""Enumeration gives up after this many steps for each type that it may find."""
_MOST_SPREADS = 5000
_SAME = 1e-12
"""Costs that differ by a smaller part of them differ by rounding."""


@dataclass(frozen=True, slots=True, eq=False)
class Types:
    """Types of groups within a limit on data parallelism.

    Args:
        counts: ``[types, sites]``; devices of each site.
        elsewhere_s: ``[types, sites]``; what a device exchanges with those of other sites.
        least_s: ``[types]``; data parallelism with the best spreads.
        spreads: by site and count, fastest first.
        high_s: the limit.
    """

    counts: Ints
    elsewhere_s: Floats
    least_s: Floats
    spreads: dict[tuple[int, int], list[Spread]]
    high_s: float

    def data_parallel_s(self) -> Floats:
        """All that a group of one of the types can take, ascending, without near equals."""
        found = [np.array([])]
        inside_s = {key: _exchanges(spreads) for key, spreads in self.spreads.items()}
        for counts, elsewhere_s, least_s in zip(
            self.counts.tolist(), self.elsewhere_s.tolist(), self.least_s.tolist(), strict=True
        ):
            for site, count in enumerate(counts):
                if count:  # the slowest devices may be in this site, if others spread well
                    slowest_s = elsewhere_s[site] + inside_s[site, count]
                    found.append(slowest_s[(slowest_s >= least_s) & (slowest_s <= self.high_s)])
        values = np.unique(np.concatenate(found))
        apart = np.diff(values, prepend=-np.inf) > _SAME * values
        return np.asarray(values[apart])


def _exchanges(spreads: Sequence[Spread]) -> Floats:
    return np.unique([spread.exchange_s for spread in spreads])


def as_group(counts: Sequence[int]) -> tuple[int, ...]:
    """The group that has ``counts[c]`` devices of c."""
    return tuple(c for c, count in enumerate(counts) for _ in range(count))


def group_types(
    problem: ClassProblem, sites: Sequence[Site], high_s: float, limit: int
) -> Types | None:
    """All types whose data parallelism is within ``high_s``.

    Returns:
        None if there are more than ``limit``.
    """
    first = [site.classes[0] for site in sites]
    between_s = problem.sync_s[np.ix_(first, first)].copy()
    np.fill_diagonal(between_s, 0.0)
    spreads: dict[tuple[int, int], list[Spread]] = {}
    inside_s = np.full((len(sites), problem.replicas + 1), np.inf)
    inside_s[:, 0] = -np.inf
    for s, site in enumerate(sites):
        for count in range(1, min(problem.replicas, site.devices) + 1):
            found: list[Spread] = []
            for spread in site.spreads(count, high_s):
                found.append(spread)
                if len(found) > _MOST_SPREADS:
                    return None
            if found:
                found.sort(key=lambda spread: (spread.exchange_s, spread.parts))
                spreads[s, count] = found
                inside_s[s, count] = found[0].exchange_s
    room_after = np.append(np.cumsum([site.devices for site in sites][::-1])[::-1], 0)
    every = np.arange(len(sites))
    found_counts: list[list[int]] = []
    # Depth first over the sites; a device more never makes an exchange cheaper, so prune early.
    stack: list[tuple[list[int], int, Floats]] = [([], problem.replicas, np.zeros(len(sites)))]
    steps = 0
    while stack:
        counts, left, exchange_s = stack.pop()
        s = len(counts)
        if left == 0:
            found_counts.append(counts + [0] * (len(sites) - s))
        if len(found_counts) > limit or steps > _STEPS_PER_TYPE * limit:
            return None
        if left == 0 or s == len(sites):
            continue
        for count in range(max(0, left - int(room_after[s + 1])), left + 1):
            steps += 1
            total_s = exchange_s + count * between_s[s]
            if (total_s[: s + 1] + inside_s[every[: s + 1], [*counts, count]] > high_s).any():
                break  # nor can there be more of it
            stack.append(([*counts, count], left - count, total_s))
    counts_of = np.array(found_counts, dtype=np.int64).reshape(-1, len(sites))
    elsewhere_s = counts_of @ between_s
    return Types(
        counts=counts_of,
        elsewhere_s=elsewhere_s,
        least_s=(elsewhere_s + inside_s[every, counts_of]).max(axis=1, initial=-np.inf),
        spreads=spreads,
        high_s=high_s,
    )


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
