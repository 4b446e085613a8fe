"""Chains of visits against all chains there are, tried one by one."""

from __future__ import annotations

import random
from functools import cache

import numpy as np
import pytest
from certify_cases import machines, problem

from ray_train_geo.cluster.topology import Topology
from ray_train_geo.planning.certify_chains import Chains, NicRoom
from ray_train_geo.planning.certify_nics import packed_nic_s
from ray_train_geo.planning.certify_visits import VisitChains
from ray_train_geo.planning.sync_cost import _nic_bytes

LAYERS = 6


def some_chains(rng):
    """Two classes of nodes of three and of one, at random prices and limits."""
    most = {name: [[rng.randint(0, 3) for _ in range(2)] for _ in range(LAYERS)] for name in "il"}
    first, room = [rng.randint(1, 3) for _ in range(2)], [rng.uniform(2, 9) for _ in range(2)]
    share, taken = [rng.uniform(0, 2), 0.0], rng.uniform(1, 2)
    table = np.array(most["i"])[None], np.array(most["l"])[None]
    left = np.broadcast_to(np.array(room), (1, LAYERS, 2))
    chains = Chains(
        LAYERS,
        np.array([first]),
        table[0],
        table[1],
        np.array([[0, LAYERS * rng.randint(0, 1)]]),
        room=NicRoom(
            (left, np.full((1, 1, 2), taken)),
            (left, np.full((1, 1, 2), taken)),
            np.array(share),
            np.zeros(2),
        ),
    )

    def fits(kind, above, behind, layers, c):
        """Whether a stage may have so many layers, behind so many of its own visit."""
        limit = first[c] if (kind, above) == ("i", 0) else most[kind][above][c]
        if (kind, above) == ("l", 0):
            return chains.only[0, c] >= layers
        by_nic = (room[c] - behind * share[c]) / taken if above else limit
        return layers <= limit and layers <= np.floor(by_nic + 1e-9)

    return chains, fits


@pytest.mark.parametrize("seed", range(30))
def test_the_cheapest_visits_are_those_of_all_chains(seed):
    rng = random.Random(seed)
    chains, fits = some_chains(rng)
    price, end_price = [rng.uniform(1, 2) for _ in range(2)], [rng.uniform(0, 1), 0.0]
    longest = 3, 1

    @cache
    def cheapest(above, begin, c, stages):
        """Behind ``above`` layers, on a visit to class ``c`` that began behind ``begin``."""
        best = np.inf
        for layers in range(1, LAYERS - above + 1):
            after, behind = above + layers, above - begin
            if after == LAYERS and fits("l", above, behind, layers, c):
                best = min(best, price[c])
            if after == LAYERS or not fits("i", above, behind, layers, c):
                continue
            if stages + 1 < longest[c]:
                best = min(best, price[c] + cheapest(after, begin, c, stages + 1))
            for d in range(2):
                ends = 5 * (end_price[c] + end_price[d])
                best = min(best, price[c] + ends + cheapest(after, after, d, 0))
        return best

    wanted = min(cheapest(0, 0, c, 0) for c in range(2))
    visits = VisitChains(chains, np.array(longest), np.array([5]))
    found = visits.cheapest(np.array(price), np.array(end_price))
    assert found.cost[0] == pytest.approx(wanted)
    if np.isfinite(wanted):
        chain = found.chain(0)
        paid = sum(price[c] for c in chain.classes) + np.dot(chain.messages, end_price)
        assert paid == pytest.approx(found.cost[0])


def test_some_nic_carries_what_full_nodes_would():
    """Of every way to put a group of five on four nodes of three."""
    table = problem(Topology(machines(12, per_node=3))).table
    everywhere = np.ones(12, dtype=bool)
    least_s = packed_nic_s(table, "sharded_ps", 5, everywhere)
    per_byte = float(table.out_seconds_per_byte[0])
    sums = []
    for split in [(3, 2, 0, 0), (3, 1, 1, 0), (2, 2, 1, 0), (2, 1, 1, 1)]:
        node = np.repeat(np.arange(4), split)[None]
        sent, _ = _nic_bytes("sharded_ps", np.ones(1), node)
        sums.append(np.bincount(node[0], sent[0], 4).mean() * per_byte)
    assert least_s == pytest.approx(min(sums))
    assert packed_nic_s(table, "sharded_ps", 3, everywhere) == 0.0
    assert packed_nic_s(table, "allreduce", 5, everywhere) == 0.0
