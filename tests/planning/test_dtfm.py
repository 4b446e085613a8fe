from __future__ import annotations

import dataclasses
from itertools import pairwise, permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_train_geo.cluster.topology import Device, Link, Topology
from ray_train_geo.errors import PlanError
from ray_train_geo.planning.dtfm import DtfmWorkload, dtfm_cost

WORKLOAD = DtfmWorkload(gradient_gb=0.6, activation_gb=0.5)


def noisy(seed, count):
    """Single-device nodes with a link of its own for each direction of each pair."""
    random = np.random.default_rng(seed)
    devices = tuple(Device(f"d{i}", f"n{i}", "x") for i in range(count))
    names = [d.node for d in devices]
    links = {
        (a, b): Link(random.uniform(0, 0.1), random.uniform(1e8, 1e9))
        for a in names
        for b in names
        if a != b
    }
    return Topology(devices, node_links=links)


def by_definition(topology, groups, workload):
    """The published formula, by trying all orders and all matchings."""

    def both_ways(a, b, gigabytes):
        links = topology.link(a, b), topology.link(b, a)
        return sum(x.latency_s + gigabytes / (x.bandwidth_bytes_per_s / 1e9) for x in links)

    groups = [[topology.device(d) for d in group] for group in groups]
    share = workload.gradient_gb / len(groups[0])
    data_parallel = max(
        sum(both_ways(a, b, share) for b in group if b != a) for group in groups for a in group
    )

    def hop(g, h):
        return min(
            max(both_ways(a, b, workload.activation_gb) for a, b in zip(g, p, strict=True))
            for p in permutations(h)
        )

    pipeline = min(sum(hop(a, b) for a, b in pairwise(order)) for order in permutations(groups))
    return data_parallel + pipeline


@given(st.integers(0, 10_000), st.integers(1, 3), st.integers(1, 3))
def test_the_cost_is_the_published_formula(seed, stages, replicas):
    topology = noisy(seed, stages * replicas)
    ids = [d.id for d in topology.devices]
    groups = [ids[i * replicas : (i + 1) * replicas] for i in range(stages)]
    cost = dtfm_cost(topology, groups, WORKLOAD)
    assert cost.total_s == pytest.approx(by_definition(topology, groups, WORKLOAD), rel=1e-12)
    assert cost.total_s == cost.data_parallel_s + cost.pipeline_s
    assert sorted(cost.order) == list(range(stages))


def test_by_hand():
    # Two regions of two: groups stay inside one, so that only the hop crosses.
    inside, across = Link(0.01, 1e9), Link(0.1, 1e8)
    topology = Topology(
        tuple(Device(f"{r}{i}", f"{r}{i}", r) for r in "ab" for i in range(2)),
        region_links={(r, s): inside if r == s else across for r in "ab" for s in "ab"},
    )
    cost = dtfm_cost(topology, [["a0", "a1"], ["b0", "b1"]], WORKLOAD)
    assert cost.data_parallel_s == pytest.approx(2 * (0.01 + 0.6 / 2))
    assert cost.pipeline_s == pytest.approx(2 * (0.1 + 0.5 / 0.1))


def test_the_published_workload():
    assert DtfmWorkload().gradient_gb == pytest.approx(0.65)
    assert DtfmWorkload().activation_gb == pytest.approx(0.47125, rel=1e-3)


def test_a_tcp_window_changes_nothing():
    plain = noisy(1, 4)
    windowed = dataclasses.replace(
        plain,
        node_links={
            p: dataclasses.replace(x, window_bytes=1e3) for p, x in plain.node_links.items()
        },
    )
    groups = [["d0", "d1"], ["d2", "d3"]]
    assert dtfm_cost(windowed, groups) == dtfm_cost(plain, groups)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([], "groups of one size"),
        ([["d0"], ["d1", "d2"]], "groups of one size"),
        ([["d0"], ["ghost"]], "ghost"),
        ([["d0"], ["d0"]], "more than one group: .'d0'."),
    ],
)
def test_groups_that_make_no_sense_are_refused(groups, message):
    with pytest.raises(PlanError, match=message):
        dtfm_cost(noisy(0, 3), groups)
