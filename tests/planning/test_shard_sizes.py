"""Shards of a sharded PS by the speed of links: no slower than equal ones, and all at once."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_train_geo.cluster.topology import Device, Link, Topology, Uplink
from ray_train_geo.planning.link_table import LinkTable
from ray_train_geo.planning.shard_sizes import shares_by_speed, stage_weights
from ray_train_geo.planning.sync_cost import SyncGroups, synced_s

QUICK = Link(0.0, 1e12)


def table_of(nics, per_node=1, link=QUICK):
    devices = tuple(Device(f"n{n}/{i}", f"n{n}") for n in range(len(nics)) for i in range(per_node))
    uplinks = {f"n{n}": Uplink(rate, rate) for n, rate in enumerate(nics)}
    return LinkTable.of(Topology(devices, default_link=link, node_uplinks=uplinks))


def synced(table, size, weights):
    """In many small buckets, so that all ways of all links are full at once."""
    members = np.arange(len(table.devices))
    group = SyncGroups(np.array([size]), members[None, :])
    zeros = np.zeros(len(members))
    return synced_s([group], "sharded_ps", members, zeros, zeros, table, size / 1e6, weights).max()


def test_a_slow_nic_makes_less_and_one_that_is_slow_enough_nothing():
    members = np.arange(4)
    equal = shares_by_speed(1e6, members, table_of([1e6] * 4))
    assert equal == pytest.approx([0.25] * 4)
    # (1 + 2 w) / rate is the same for all: 0.8 (1 + 2 w) = T, (1 + 2 v) = T, w + 3 v = 1.
    some = shares_by_speed(1e6, members, table_of([8e5, 1e6, 1e6, 1e6]))
    assert (1 + 2 * some) / [0.8, 1, 1, 1] == pytest.approx(np.full(4, 6 / 3.8))
    none = shares_by_speed(1e6, members, table_of([1e5, 1e6, 1e6, 1e6]))
    assert none[0] == pytest.approx(0, abs=1e-9)
    table = table_of([1e5, 1e6, 1e6, 1e6])
    assert synced(table, 1e6, none) == pytest.approx(10, 1e-3)
    assert synced(table, 1e6, equal) == pytest.approx(15, 1e-3)


def test_nobody_makes_more_than_its_links_carry_in_time():
    """The NIC of node 0 could carry all of it, but its links are as slow as the others'."""
    table = table_of([1e8, 1e6, 1e6, 1e6], link=Link(0.0, 2e5))
    assert shares_by_speed(1e6, np.arange(4), table) == pytest.approx([0.25] * 4)


def test_two_members_of_a_node_are_one_node():
    shares = shares_by_speed(1e6, np.arange(6), table_of([1e6, 1e6, 1e6], per_node=2))
    assert shares == pytest.approx([1 / 6] * 6)
    alone = shares_by_speed(1e6, np.arange(2), table_of([1e6], per_node=2))
    assert alone == pytest.approx([0.5] * 2)


@given(
    st.lists(st.sampled_from([1e5, 3e5, 1e6, 1e7]), min_size=2, max_size=5),
    st.integers(1, 3),
    st.sampled_from([QUICK, Link(0.01, 1e6), Link(0.1, 1e5)]),
)
def test_no_slower_than_equal_shards(nics, per_node, link):
    table = table_of(nics, per_node, link)
    shares = shares_by_speed(2e6, np.arange(len(table.devices)), table)
    assert shares.sum() == pytest.approx(1)
    assert shares.min() >= 0
    assert synced(table, 2e6, shares) <= synced(table, 2e6, np.ones(len(shares))) * (1 + 1e-4)


def test_a_stage_in_several_groups_has_their_mean():
    table = table_of([1e5, 1e6, 1e6, 1e6])
    four = SyncGroups(np.array([3e6]), np.array([[0, 1, 2, 3]]))
    two = SyncGroups(np.array([1e6]), np.array([[0, 1]]))
    assert stage_weights([four], np.arange(4), table) == pytest.approx(
        [0, 4 / 3, 4 / 3, 4 / 3], 1e-3
    )
    both = stage_weights([four, two], np.arange(4), table)
    assert both[2] == pytest.approx(4 / 3, 1e-3)
    assert both[0] == pytest.approx(
        (1e6 * 2 * shares_by_speed(1e6, np.arange(2), table)[0]) / 4e6, abs=1e-3
    )
