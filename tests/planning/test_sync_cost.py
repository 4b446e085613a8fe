from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from ray_train_geo.cluster.topology import Device, Link, Topology, Uplink
from ray_train_geo.model.catalog import CATALOG, total_parameters
from ray_train_geo.planning.link_table import LinkTable
from ray_train_geo.planning.sync_cost import SyncGroups, sync_groups, synced_s

DIMS = CATALOG["gpt-tiny"]
UNTIED = replace(DIMS, tied_embeddings=False)
TOKENS = DIMS.vocab_size * DIMS.dim
DEVICES = tuple(Device(f"n{i}/0", f"n{i}", region="ab"[i // 2]) for i in range(4))
WAN = Link(latency_s=0.1, bandwidth_bytes_per_s=1e6)
WIDE = {d.node: Uplink(1e12, 1e12) for d in DEVICES}
TOPOLOGY = Topology(DEVICES, region_links={("a", "b"): WAN, ("b", "a"): WAN}, node_uplinks=WIDE)


def own_s(mode, size, topology, members=(0, 1, 2, 3)):
    """What one group of equal, waiting members takes."""
    group = SyncGroups(np.array([size]), np.array([members]))
    zeros = np.zeros(len(members))
    numbers = np.array(members)
    where = SyncGroups(group.size_bytes, np.arange(len(members))[None, :])
    return synced_s([where], mode, numbers, zeros, zeros, LinkTable.of(topology)).max()


@pytest.mark.parametrize(
    ("mode", "seconds"),
    [
        ("allreduce", 2 * 3 * (0.1 + 2.0 / 4)),
        ("sharded_ps", 2 * (0.1 + 2.0 / 4)),
        ("central_ps", 2 * (0.1 + 2.0)),
    ],
)
def test_formulas(mode, seconds):
    # The slow link is on the way in each mode: 2 MB at 1 MB/s, 100 ms.
    assert own_s(mode, 2e6, TOPOLOGY) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("mode", "megabytes"), [("allreduce", 2 * 3 / 4), ("sharded_ps", 2 * 3 / 4), ("central_ps", 6)]
)
def test_a_nic_carries_what_all_pairs_send(mode, megabytes):
    quick = {(a, b): Link(0.0, 1e12) for a in "ab" for b in "ab"}
    narrow = WIDE | {"n0": Uplink(1e6, 1e6)}
    topology = Topology(DEVICES, region_links=quick, node_uplinks=narrow)
    assert own_s(mode, 1e6, topology) == pytest.approx(megabytes)


@pytest.mark.parametrize(
    ("mode", "megabytes"), [("allreduce", 2 * 3 / 4), ("sharded_ps", 2), ("central_ps", 2)]
)
def test_an_uplink_carries_all_flows_between_two_regions(mode, megabytes):
    quick = {(a, b): Link(0.0, 1e12) for a in "ab" for b in "ab"}
    shared = {("a", "b"): 1e6, ("b", "a"): 1e6}
    topology = Topology(DEVICES, region_links=quick, node_uplinks=WIDE, region_uplinks=shared)
    assert own_s(mode, 1e6, topology) == pytest.approx(megabytes)


def test_a_ring_uses_only_neighbours():
    slow_back = {("n1", "n0"): Link(0.3, 1e5)}
    topology = Topology(DEVICES, node_links=slow_back, node_uplinks=WIDE)
    assert own_s("allreduce", 1e5, topology) < 0.02  # 0 > 1 > 2 > 3 > 0, never 1 > 0
    assert own_s("sharded_ps", 1e5, topology) > 0.6


def test_large_groups_are_as_slow_as_their_worst_pair():
    devices = tuple(Device(f"{r}{i}/0", f"{r}{i}", region=r) for r in "ab" for i in range(40))
    links = {("a", "b"): WAN, ("b", "a"): WAN}
    topology = Topology(devices, region_links=links)
    apart = own_s("sharded_ps", 80e6, topology, range(80))
    assert apart == pytest.approx(2 * (0.1 + 1.0), rel=0.01)
    near = own_s("sharded_ps", 80e6, Topology(devices), range(80))
    assert near < 0.2


def test_a_group_starts_with_its_slowest_member_and_ends_after_its_last_backward():
    group = SyncGroups(np.array([2e6]), np.array([[0, 1]]))
    topology = Topology(DEVICES, node_uplinks=WIDE, region_links={("a", "a"): Link(0.0, 1e6)})
    table, devices = LinkTable.of(topology), np.array([0, 1])
    done = synced_s(
        [group], "sharded_ps", devices, np.array([3.0, 5.0]), np.array([4.0, 6.0]), table
    )
    assert done.tolist() == [7.0, 7.0]  # 5 + 2 x 1 s, more than the backward's end
    late = np.array([6.0, 9.0])
    done = synced_s([group], "sharded_ps", devices, np.array([3.0, 5.0]), late, table)
    assert done.tolist() == [9.0, 9.0]


def test_groups_of_different_cuts():
    # Layers 0 1 | 2 | 3: stages 0 and 1 are pipeline 0, 2 and 3 are pipeline 1.
    cuts = [(0, 3, 4), (0, 2, 4)]
    (groups,) = sync_groups(UNTIED, cuts)
    assert groups.members.tolist() == [[0, 2], [0, 3], [1, 3]]
    assert groups.size_bytes.sum() == 4 * total_parameters(UNTIED)

    tied, tokens = sync_groups(DIMS, cuts)
    assert (groups.size_bytes - tied.size_bytes).tolist() == [4 * TOKENS, 0, 4 * TOKENS]
    assert tokens.members.tolist() == [[0, 2, 1, 3]]  # first stages, then last ones
    assert tokens.size_bytes.tolist() == [4 * TOKENS]


def test_one_pipeline_syncs_only_a_tied_matrix():
    (tokens,) = sync_groups(DIMS, [(0, 2, 4)])
    assert tokens.members.tolist() == [[0, 1]]
    assert sync_groups(UNTIED, [(0, 2, 4)]) == []
    assert sync_groups(DIMS, [(0, 4)]) == []


def test_every_bucket_of_a_ring_pays_its_latencies():
    devices = np.array([0, 1, 2])
    table = LinkTable.of(
        Topology(
            tuple(Device(id=f"{i}/0", node=str(i), region="r") for i in range(3)),
            region_links={("r", "r"): Link(0.1, 1e6)},
            node_uplinks={str(i): Uplink(1e12, 1e12) for i in range(3)},
        )
    )
    group = SyncGroups(np.array([8e6]), np.array([[0, 1, 2]]))
    zeros = np.zeros(3)

    def done(bucket_bytes):
        return synced_s([group], "allreduce", devices, zeros, zeros, table, bucket_bytes).max()

    carried_s = 2 * 2 * 8 / 3
    assert done(math.inf) == pytest.approx(carried_s + 4 * 0.1)
    assert done(1e6) == pytest.approx(carried_s + 4 * 4 * 0.1)  # 8 rings, two at once
