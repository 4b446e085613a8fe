from __future__ import annotations

import pytest

from ray_train_geo.cluster.topology import Device, Link, Topology
from ray_train_geo.errors import PlanError
from ray_train_geo.planning.dtfm import dtfm_cost
from ray_train_geo.planning.dtfm_assignment import dtfm_assignment


def link(latency_ms, gbps):
    return Link(latency_ms / 1e3, gbps * 1e9 / 8)


def in_one_room(nodes, gbps):
    """Devices inside a node at 100 Gbit/s, between nodes at ``gbps``; ``nodes`` counts devices."""
    devices = tuple(
        Device(f"n{n}/{i}", f"n{n}", "r") for n, g in enumerate(nodes) for i in range(g)
    )
    return Topology(
        devices,
        node_links={(d.node, d.node): link(0, 100) for d in devices},
        region_links={("r", "r"): link(0, gbps)},
    )


def in_regions(count, names, inside, across):
    devices = tuple(Device(f"{r}{i}/0", f"{r}{i}", r) for r in names for i in range(count))
    links = {(r, r): inside for r in names}
    for (a, b), between in across.items():
        links[a, b] = links[b, a] = between
    return Topology(devices, region_links=links)


CASES = {
    "datacenter": (in_one_room([8] * 8, 3.125), 3.440),
    "datacenter-spot": (in_one_room([4] * 8 + [1] * 32, 1.25), 31.634),
    "universities": (
        in_regions(32, ["ohio", "virginia"], link(1, 5), {("ohio", "virginia"): link(11, 1.12)}),
        16.087,
    ),
    "regional": (
        in_regions(
            16,
            ["virginia", "oregon", "california", "ohio"],
            link(5, 2),
            {
                ("virginia", "oregon"): link(67, 1.15),
                ("virginia", "california"): link(59, 1.05),
                ("virginia", "ohio"): link(11, 1.12),
                ("oregon", "california"): link(12, 1.25),
                ("oregon", "ohio"): link(49, 1.1),
                ("california", "ohio"): link(52, 1.02),
            },
        ),
        34.802,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_dt_fms_cases_are_solved_and_proven(name):
    topology, published = CASES[name]
    found = dtfm_assignment(topology, 8, 8, moves=100)
    assert found.cost.total_s == pytest.approx(published, abs=5e-4)
    assert found.lower_bound == found.cost.total_s
    assert "proved" in found.argument
    checked = dtfm_cost(topology, found.groups)
    assert checked.total_s == pytest.approx(found.cost.total_s, rel=1e-12)


def test_pipelines_are_the_groups_chained_by_their_fastest_matchings():
    topology, _ = CASES["datacenter-spot"]
    found = dtfm_assignment(topology, 8, 8, moves=0, prove=False)
    assert [set(group) for group in found.groups] == [
        {chain[k] for chain in found.pipelines} for k in range(8)
    ]
    named = [device for chain in found.pipelines for device in chain]
    assert len(set(named)) == len(named) == 64
    # Four of the seven hops must leave the node; the others need not.
    slow = [
        any(chain[k].split("/")[0] != chain[k + 1].split("/")[0] for chain in found.pipelines)
        for k in range(7)
    ]
    assert sum(slow) == 4


def test_far_devices_are_left_out():
    topology = in_regions(4, ["near", "far"], link(1, 5), {("near", "far"): link(200, 0.3)})
    found = dtfm_assignment(topology, 2, 2, moves=50)
    assert {d[:3] for group in found.groups for d in group} in ({"nea"}, {"far"})
    assert found.lower_bound == found.cost.total_s


def test_noisy_links_have_the_bound_of_a_relaxation_that_says_so():
    base, _ = CASES["universities"]
    devices = base.devices[6:58]  # more classes than the exact models take
    noise = {
        (a.node, b.node): Link(
            base.link(a, b).latency_s,
            base.link(a, b).bandwidth_bytes_per_s * (1 + 0.02 * ((7 * i + 3 * j) % 11 - 5)),
        )
        for i, a in enumerate(devices)
        for j, b in enumerate(devices)
        if i != j
    }
    found = dtfm_assignment(Topology(devices, noise), 4, 13, moves=500, proof_effort=0.2)
    assert "relaxation" in found.argument
    assert 0.75 * found.cost.total_s < found.lower_bound < found.cost.total_s


def test_same_seed_same_assignment():
    topology, _ = CASES["universities"]
    first, second = (dtfm_assignment(topology, 4, 16, seed=3, moves=300) for _ in range(2))
    assert first == second


@pytest.mark.parametrize(("stages", "replicas"), [(9, 8), (0, 8), (8, 0)])
def test_impossible_shapes_are_refused(stages, replicas):
    with pytest.raises(PlanError, match="replicas"):
        dtfm_assignment(CASES["datacenter"][0], stages, replicas)


def test_devices_without_a_link_are_refused():
    devices = Device("a", "a", "x"), Device("b", "b", "y")
    with pytest.raises(PlanError, match="no link"):
        dtfm_assignment(Topology(devices, default_link=None), 1, 2)
