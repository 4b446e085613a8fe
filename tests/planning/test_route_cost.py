"""What sums along routes cost, beside what is worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from ray_train_geo.cluster.topology import Device, Link, Topology, Uplink
from ray_train_geo.planning.link_table import LinkTable
from ray_train_geo.planning.route_cost import route_loads
from ray_train_geo.planning.sync_cost import SyncGroups, synced_s

REGIONS = "aabb"
DEVICES = tuple(Device(f"n{i}/0", f"n{i}", region=r) for i, r in enumerate(REGIONS))
NEAR, FAR = Link(0.0, 1e7), Link(0.1, 1e6)
WIDE = {d.node: Uplink(1e12, 1e12) for d in DEVICES}
LINKS = {(a, b): NEAR if a == b else FAR for a in "ab" for b in "ab"}
TOPOLOGY = Topology(DEVICES, region_links=LINKS, node_uplinks=WIDE)


def sync_s(mode, size, topology, **changes):
    group = SyncGroups(np.array([size]), np.arange(4)[None, :])
    zeros = np.zeros(4)
    return synced_s(
        [group], mode, np.arange(4), zeros, zeros, LinkTable.of(topology), **changes
    ).max()


@pytest.mark.parametrize(
    ("mode", "seconds"),
    [
        ("hierarchical", 2 * (1.0 / 10) + 2 * (0.1 + 0.5)),  # halves inside, quarters between
        ("tree", 2 * (2.0 / 10) + 2 * (0.1 + 2.0)),
    ],
)
def test_rounds_follow_one_another(mode, seconds):
    assert sync_s(mode, 2e6, TOPOLOGY) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("mode", "megabytes"),
    [("hierarchical", 2 * 3 / 4), ("tree", 2 * 2)],  # n0 gets from n1, then n2, and sends in turn
)
def test_a_nic_carries_all_of_its_members_messages(mode, megabytes):
    quick = {(a, b): Link(0.0, 1e12) for a in "ab" for b in "ab"}
    narrow = WIDE | {"n0": Uplink(1e6, 1e6)}
    topology = Topology(DEVICES, region_links=quick, node_uplinks=narrow)
    assert sync_s(mode, 1e6, topology) == pytest.approx(megabytes)


@pytest.mark.parametrize(
    ("mode", "megabytes"), [("sharded_ps", 2), ("hierarchical", 1), ("tree", 2)]
)
def test_an_uplink_carries_what_regions_exchange(mode, megabytes):
    """A tree's sum goes up before it comes down; the halves of the others fill both ways."""
    quick = {(a, b): Link(0.0, 1e12) for a in "ab" for b in "ab"}
    shared = {("a", "b"): 1e6, ("b", "a"): 1e6}
    topology = Topology(DEVICES, region_links=quick, node_uplinks=WIDE, region_uplinks=shared)
    assert sync_s(mode, 1e6, topology) == pytest.approx(megabytes)


def test_what_is_shared_is_waited_for_in_each_round():
    shared = {("a", "b"): 1e6, ("b", "a"): 1e6}
    wide = {pair: Link(k.latency_s, 1e12) for pair, k in LINKS.items()}
    topology = Topology(DEVICES, region_links=wide, node_uplinks=WIDE, region_uplinks=shared)
    assert sync_s("hierarchical", 2e6, topology) == pytest.approx(2 * (0.1 + 1.0), rel=1e-3)


def test_equal_weights_cost_what_a_sharded_server_does():
    weighted = sync_s("sharded_ps", 2e6, TOPOLOGY, weights=np.full(4, 3.0))
    assert weighted == pytest.approx(sync_s("sharded_ps", 2e6, TOPOLOGY))
    largest = sync_s("sharded_ps", 2e6, TOPOLOGY, weights=np.array([1.0, 1.0, 1.0, 3.0]))
    assert largest == pytest.approx(2 * (0.1 + 2.0 * 3 / 6))


def test_groups_in_other_places_have_other_routes():
    members = np.array([[0, 1, 2, 3], [0, 2, 1, 3]])
    table = LinkTable.of(TOPOLOGY)
    own_s, parts = route_loads("hierarchical", np.full(2, 2e6), members, table)
    assert own_s[0] == pytest.approx(own_s[1])
    assert parts[0, 0, 1] == parts[1, 0, 2] > parts[0, 0, 2] == parts[1, 0, 1]
