from __future__ import annotations

from itertools import combinations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ray_train_geo.planning.dtfm_classes import ClassProblem
from ray_train_geo.planning.dtfm_sites import sites_of


def regions_of_nodes(regions):
    """``regions[r]`` has (size, cost inside) of its nodes; 5 between nodes, 9 between regions."""
    nodes = [(r, size, own) for r, inside in enumerate(regions) for size, own in inside]
    region = np.array([r for r, _, _ in nodes])
    costs = np.where(region[:, None] == region[None, :], 5.0, 9.0)
    np.fill_diagonal(costs, [own if size > 1 else 0.0 for _, size, own in nodes])
    return ClassProblem(1, 2, tuple(size for _, size, _ in nodes), costs, costs)


def test_nodes_of_a_region_are_a_site_and_families_share_a_link_inside():
    problem = regions_of_nodes([[(2, 1.0), (4, 1.0), (2, 3.0), (1, 0.0)], [(4, 1.0), (4, 3.0)]])
    first, second = sites_of(problem)
    assert first.families == ((1, 0, 3), (2,))
    assert first.sizes == ((4, 2, 1), (2,))
    assert (first.own_sync_s, first.inside_sync_s) == ((1.0, 3.0), 5.0)
    assert second.classes == (4, 5)


@given(
    st.lists(
        st.tuples(st.integers(1, 4), st.sampled_from([1.0, 3.0, 6.0])), min_size=1, max_size=5
    ),
    st.integers(1, 6),
    st.sampled_from([9.0, 15.0, 100.0]),
)
def test_spreads_are_all_choices_of_devices_within_the_limit(nodes, count, most_s):
    problem = regions_of_nodes([nodes])
    # Elsewhere devices of one family are told apart by node: count parts only.
    found = set()
    sites = sites_of(problem)
    assert sum(site.devices for site in sites) == sum(problem.sizes)
    for site in sites:
        owner = {c: f for f, family in enumerate(site.families) for c in family}
        devices = [c for c in site.classes for _ in range(problem.sizes[c])]
        for group in set(combinations(devices, count)):
            parts = [[] for _ in site.families]
            for c in set(group):
                parts[owner[c]].append(group.count(c))
            exchange_s = problem.data_parallel_s(group)
            if exchange_s <= most_s:
                found.add((tuple(tuple(sorted(p, reverse=True)) for p in parts), exchange_s))
        spreads = list(site.spreads(count, most_s))
        assert {(spread.parts, spread.exchange_s) for spread in spreads} == found
        assert len(spreads) == len(found)
        found.clear()
