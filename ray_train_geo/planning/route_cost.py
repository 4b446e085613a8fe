"""What a sum along a route puts on links, NICs and uplinks (see `sync_routes`)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ray_train_geo.planning.link_table import Floats, Ints, LinkTable
from ray_train_geo.planning.sync_routes import Route, route_of, sites_of
from ray_train_geo.spec import GradientSyncName

__all__ = ["RouteLoad", "reduce_parts", "route_loads"]


class RouteLoad(NamedTuple):
    """Of groups of equal size.

    Args:
        own_s: ``[groups]``; each group's time if it had the network to itself.
        parts: ``[groups, n, n]``; what one member sends another in both halves of the sum, in
            parts of the group's gradients.  As much comes back.
    """

    own_s: Floats
    parts: Floats


def route_loads(
    mode: GradientSyncName,
    size: Floats,
    members: Ints,
    table: LinkTable,
    bucket_bytes: float = math.inf,
    weights: Floats | None = None,
) -> RouteLoad:
    """What groups put on the network by a mode that has routes.

    Every bucket passes all rounds, each of which waits for its slowest message, and for what its
    messages share: links, NICs and uplinks.  Buckets follow one another as fast as the busiest of
    these lets them; in a tree as if its busiest link were full either upwards or downwards.

    Args:
        size: ``[groups]``; bytes that each group sums.
        members: ``[groups, n]``; device numbers.
        bucket_bytes: what is summed at once at most.
        weights: ``[groups, n]``; of the members' shards in a sharded PS; by default all alike.
    """
    groups, n = members.shape
    own_s, parts = np.zeros(groups), np.zeros((groups, n, n))
    for g, row in enumerate(members):
        sites = sites_of(table.region[row].tolist(), table.node[row].tolist())
        shares = None if weights is None else (weights[g] / weights[g].sum()).tolist()
        one_way = reduce_parts(route_of(mode, _numbered(sites), shares), n)
        ways = np.concatenate([one_way, one_way.transpose(0, 2, 1)])
        parts[g] = ways.sum(axis=0)
        links = _Links(row, table)
        latency_s = sum(links.latency_s(way > 0) for way in ways)
        transfer_s = size[g] * sum(links.busy_s(way) for way in ways)
        buckets = max(1.0, math.ceil(size[g] / bucket_bytes))
        halves = (one_way.sum(axis=0), one_way.sum(axis=0).T) if mode == "tree" else (parts[g],)
        steady_s = size[g] * sum(map(links.busy_s, halves))
        own_s[g] = latency_s + transfer_s / buckets + steady_s * (1 - 1 / buckets)
    return RouteLoad(own_s, parts)


class _Links:
    """What lies between the members of a group."""

    def __init__(self, members: Ints, table: LinkTable) -> None:
        self._table = table
        self._node, self._region = table.node[members], table.region[members]
        self._away = self._node[:, None] != self._node[None, :]
        self._latency_s, self._per_byte = table.hops(members[:, None], members[None, :])

    def latency_s(self, used: NDArray[np.bool_]) -> float:
        """Until a round's messages have arrived; both ways, as their answers come back."""
        either = used | used.T
        return float(np.where(either, self._latency_s, 0.0).max())

    def busy_s(self, sent: Floats) -> float:
        """How long the busiest link, NIC or uplink needs for ``[n, n]`` bytes."""
        table = self._table
        links = np.where(sent > 0, self._per_byte, 0.0) * sent
        away = np.where(self._away, sent, 0.0)
        nodes, regions = len(table.nodes), len(table.regions)
        out = np.bincount(self._node, away.sum(axis=1), nodes) * table.out_seconds_per_byte
        into = np.bincount(self._node, away.sum(axis=0), nodes) * table.in_seconds_per_byte
        between = np.zeros((regions, regions))
        np.add.at(between, (self._region[:, None], self._region[None, :]), away)
        uplinks = between * table.uplink_seconds_per_byte
        return float(max(links.max(), out.max(), into.max(), uplinks.max()))


def _numbered(sites: Sequence[object]) -> tuple[int, ...]:
    """Sites by the order of their first members: so that groups alike have one route."""
    numbers = {site: i for i, site in enumerate(dict.fromkeys(sites))}
    return tuple(numbers[site] for site in sites)


@lru_cache(maxsize=256)
def reduce_parts(route: Route, members: int) -> Floats:
    """``[rounds, members, members]``; what one gives another in each round, in parts of all."""
    found = np.zeros((len(route.rounds), members, members))
    for r, transfers in enumerate(route.rounds):
        for t in transfers:
            found[r, t.source, t.target] = sum(route.shares[p] for p in t.pieces)
    found.flags.writeable = False  # it is shared by all who ask
    return found
