"""Collectives as NCCL runs them: rings and chains that carry chunks one behind the other.

A collective that moves ``size`` bytes over each of its links takes the slowest link's time for
them, and the latencies on its way.  Where several run at once, no NIC and no uplink is done before
it has carried the bytes of all.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

from ray_train_geo.planning.link_table import LinkTable

__all__ = ["all_reduce_s", "reduce_and_broadcast_s", "ring", "ring_of_all"]

_Flow = tuple[int, int]


def ring(members: Sequence[int]) -> list[_Flow]:
    """Each to the next, the last to the first."""
    if len(members) < 2:
        return []
    return [(a, members[(i + 1) % len(members)]) for i, a in enumerate(members)]


def reduce_and_broadcast_s(
    table: LinkTable,
    groups: Sequence[Sequence[int]],
    sizes: Sequence[float],
    window_bytes: float = math.inf,
) -> float:
    """Central PS: a reduce along a chain of the members, then a broadcast back; all groups at once.

    Args:
        groups: ``[groups][members]``, in the order of their ranks.
        sizes: ``[groups]``; bytes that each member has.
        window_bytes: most that is under way between two members in a round trip.
    """
    chains = [ring(group)[:-1] for group in groups]
    there = _together_s(table, chains, sizes, window_bytes=window_bytes)
    backwards = [[(b, a) for a, b in chain] for chain in chains]
    return there + _together_s(table, backwards, sizes, window_bytes=window_bytes)


def all_reduce_s(
    table: LinkTable, groups: Sequence[Sequence[int]], sizes: Sequence[float]
) -> float:
    """Ring all-reduce: ``2 (n - 1) / n`` of the bytes over every link; all groups at once."""
    parts = [2 * (len(group) - 1) / len(group) for group in groups]
    moved = [size * part for size, part in zip(sizes, parts, strict=True)]
    return _together_s(table, [ring(group) for group in groups], moved, rounds=2.0)


def ring_of_all(table: LinkTable) -> tuple[float, float]:
    """Of one ring of all devices: (seconds per byte of its slowest link, seconds once around)."""
    hops = [table.hop(a, b) for a, b in ring(range(len(table.devices)))]
    per_byte = max((per_byte for _, per_byte in hops), default=0.0)
    for a, b in ring(range(len(table.devices))):
        if table.node[a] != table.node[b]:
            nics = (
                table.out_seconds_per_byte[table.node[a]],
                table.in_seconds_per_byte[table.node[b]],
            )
            per_byte = max(per_byte, *map(float, nics))
    return per_byte, sum(latency for latency, _ in hops)


def _together_s(
    table: LinkTable,
    groups: Sequence[Sequence[_Flow]],
    sizes: Sequence[float],
    rounds: float = 1.0,
    window_bytes: float = math.inf,
) -> float:
    """Until all flows of all groups have carried their group's ``sizes``."""
    alone_s = 0.0
    carried_s: dict[tuple[str, int, int], float] = defaultdict(float)
    for flows, size in zip(groups, sizes, strict=True):
        hops = [table.hop(a, b) for a, b in flows]
        if not hops:
            continue
        way_s = rounds * sum(latency for latency, _ in hops)
        slowest = max(max(per_byte, 2 * latency / window_bytes) for latency, per_byte in hops)
        alone_s = max(alone_s, way_s + size * slowest)
        for a, b in flows:
            n, m = int(table.node[a]), int(table.node[b])
            if n != m:
                r, q = int(table.region[a]), int(table.region[b])
                carried_s["out", n, 0] += size * float(table.out_seconds_per_byte[n])
                carried_s["in", m, 0] += size * float(table.in_seconds_per_byte[m])
                carried_s["uplink", r, q] += size * float(table.uplink_seconds_per_byte[r, q])
    return max(alone_s, *carried_s.values()) if carried_s else alone_s
