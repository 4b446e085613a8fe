"""The least that summing gradients takes, and where pipelines must be for so little.

Every layer is summed by a group with one member in each pipeline.  At a cost ``v``, sites fall
apart into islands whose pairs cost at most ``v``; a layer is *local* if its group is on one of
them, and else its group costs more than ``v``::

    v small:   (ohio) (virginia) (tokyo) (seoul)
    v larger:  (ohio -- virginia) (tokyo -- seoul)
    v large:   (ohio -- virginia -- tokyo -- seoul)

Let ``v`` be the least at which some layer is local.  Then a plan is one of these:

- Layers are local to one island only.  All pipelines pass it, and whoever is elsewhere holds layers
  that are not local.
- Layers are local to several islands: every pipeline passes one of them, and leaves it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ray_train_geo.planning.link_table import Floats, Ints, LinkTable
from ray_train_geo.spec import GradientSyncName

__all__ = [
    "GroupFloor",
    "SyncCase",
    "between_nodes",
    "components",
    "group_floor",
    "sync_cases",
    "within_nodes",
]

Sites = tuple[bool, ...]

_MOST_LEVELS = 12
"""Where links are noisy every pair of sites would be a level; neighbouring ones are then one."""


@dataclass(frozen=True, slots=True)
class GroupFloor:
    """A group that sums ``G`` bytes takes at least ``latency_s + G * seconds_per_byte``."""

    latency_s: float = 0.0
    seconds_per_byte: float = 0.0


@dataclass(frozen=True, slots=True)
class SyncCase:
    """Plans whose groups all take at least ``floor``, and whose pipelines all meet ``sites``.

    Args:
        beyond: what groups with a member that is not on ``sites`` take at least.
        leaves: every pipeline has a hop between one of ``sites`` and one of the others.
    """

    floor: GroupFloor
    sites: Sites
    beyond: GroupFloor
    leaves: bool = False

    def anywhere(self) -> SyncCase:
        """Nothing is said of where pipelines are."""
        return SyncCase(self.floor, (True,) * len(self.sites), self.floor)


def between_nodes(table: LinkTable) -> tuple[Floats, Floats]:
    """``[sites, sites]``: latency and seconds per byte between two nodes, infinite without two."""
    pairs = np.unique(np.stack([table.node, table.site]), axis=1)
    one_node = np.diag(np.bincount(pairs[1], minlength=len(table.latency_s)) == 1)
    return (
        np.where(one_node, np.inf, table.latency_s),
        np.where(one_node, np.inf, table.seconds_per_byte),
    )


def within_nodes(table: LinkTable) -> tuple[Floats, Floats]:
    """Latency and seconds per byte between devices of each node that has two."""
    shared = np.bincount(table.node) > 1
    latency = table.local_latency_s[shared].astype(float)
    return latency, table.local_seconds_per_byte[shared]


def sync_cases(
    table: LinkTable,
    mode: GradientSyncName,
    members: tuple[int, int],
    least_bytes: float,
) -> list[SyncCase]:
    """All cases there are for groups of ``members`` (fewest, most) and at least ``least_bytes``."""
    fewest, most = members
    everywhere = (True,) * len(table.latency_s)
    if fewest < 2:
        return [SyncCase(GroupFloor(), everywhere, GroupFloor())]
    messages, parts = _factors(mode, fewest, most)
    cost, per_byte = _pairs(table, mode, messages, parts, least_bytes)
    devices = np.bincount(table.site, minlength=len(table.latency_s))
    on_node = np.zeros(len(devices), dtype=np.int64)
    np.maximum.at(on_node, table.site, np.bincount(table.node)[table.node])

    def at_least(value: float) -> GroupFloor:
        """At least the pair's cost for the smallest group, and each byte more at the best rate."""
        rate = float(per_byte[cost >= value].min())
        return GroupFloor(max(0.0, value - least_bytes * rate), rate)

    cases: list[SyncCase] = []
    if on_node.max() >= fewest:  # all of some group on one node, whose NIC is idle
        # Other layers' groups may be elsewhere, if that is faster.
        links = zip(within_nodes(table), between_nodes(table), strict=True)
        latency, rate = (min(inside.min(), across.min()) for inside, across in links)
        local = GroupFloor(float(messages * latency), float(parts * rate))
        here = (np.arange(len(devices)) == site for site in np.flatnonzero(on_node >= fewest))
        cases += [SyncCase(local, tuple(sites.tolist()), local) for sites in here]
    merges = components(cost)
    values = [value for value, _ in merges]
    step = max(1, -(-len(values) // _MOST_LEVELS))
    for start in range(0, len(values), step):
        end = min(start + step, len(values))
        floor = at_least(values[start])
        beyond = at_least(values[end]) if end < len(values) else floor
        labels = merges[end - 1][1]
        islands = [labels == label for label in np.unique(labels)]
        large = [island for island in islands if devices[island].sum() >= fewest]
        for sites in (tuple(island.tolist()) for island in large):
            cases.append(SyncCase(floor, sites, beyond))
            if len(large) > 1:
                cases.append(SyncCase(floor, sites, floor, leaves=True))
    return cases


def group_floor(
    table: LinkTable, mode: GradientSyncName, members: tuple[int, int], size_bytes: float
) -> float:
    """Seconds that a group of ``size_bytes`` takes wherever it is."""
    floors = [c.floor for c in sync_cases(table, mode, members, size_bytes)]
    seconds = (f.latency_s + size_bytes * f.seconds_per_byte for f in floors)
    return min(seconds, default=0.0)


def components(cost: Floats) -> list[tuple[float, Ints]]:
    """How sites grow together as dearer pairs are allowed (Kruskal, 1956).

    Args:
        cost: ``[sites, sites]``, symmetric; infinite where there is no link.

    Returns:
        ``(cost, labels [sites])``, ascending: the least cost of a pair at which the labels hold.
        The first is the cheapest pair of all, inside a site or across.
    """
    sites = len(cost)
    upper_a, upper_b = np.triu_indices(sites)
    values = cost[upper_a, upper_b]
    order = np.argsort(values, kind="stable")
    order = order[np.isfinite(values[order])]
    labels = np.arange(sites)
    found: list[tuple[float, Ints]] = []
    for i in order:
        a, b, value = labels[upper_a[i]], labels[upper_b[i]], float(values[i])
        if found and a == b:
            continue
        labels = np.where(labels == b, a, labels)
        if found and found[-1][0] == value:
            found.pop()
        found.append((value, labels))
    return found


def _factors(mode: GradientSyncName, fewest: int, most: int) -> tuple[float, float]:
    """How often a pair's latency counts, and which part of the bytes: see planning.sync_cost."""
    if mode == "sharded_ps":
        return 2.0, 2.0 / most
    if mode == "allreduce":
        return 2.0 * (fewest - 1), 2.0 * (fewest - 1) / fewest
    return 1.0, 1.0


def _pairs(
    table: LinkTable, mode: GradientSyncName, messages: float, parts: float, size_bytes: float
) -> tuple[Floats, Floats]:
    """``[sites, sites]``, symmetric: seconds for ``size_bytes``, and at least for a byte more.

    Sharded PS uses both directions of every pair, a ring one of them, and central PS both, one
    after the other.
    """
    latency, per_byte = between_nodes(table)
    per_byte = parts * per_byte
    cost = messages * latency + size_bytes * per_byte
    if mode == "central_ps":
        return cost + cost.T, per_byte + per_byte.T
    pick = np.maximum if mode == "sharded_ps" else np.minimum
    return pick(cost, cost.T), np.minimum(per_byte, per_byte.T)
