from __future__ import annotations

import math

import numpy as np
import pytest

from ray_train_geo.cluster.topology import DEFAULT_LINK, LOCAL_LINK, Device, Link, Topology, Uplink
from ray_train_geo.planning.link_table import LinkTable

# a: nodes x (two devices), y; b: nodes z, w.
DEVICES = (
    Device("x/0", "x", region="a"),
    Device("x/1", "x", region="a"),
    Device("y/0", "y", region="a"),
    Device("z/0", "z", region="b"),
    Device("w/0", "w", region="b"),
)
THERE, BACK = Link(0.1, 1e6), Link(0.2, 5e5)
REGIONS = {("a", "b"): THERE, ("b", "a"): BACK, ("a", "a"): Link(0.0, 1e8)}


def every_pair_is_the_topologys(topology: Topology) -> None:
    table = LinkTable.of(topology)
    numbers = np.arange(len(topology.devices))
    latency, per_byte = table.hops(numbers[:, None], numbers[None, :])
    for i, a in enumerate(topology.devices):
        for j, b in enumerate(topology.devices):
            if i == j:
                continue
            link = topology.link(a, b)
            expected = link.latency_s, 1 / link.flow_bytes_per_s
            assert table.hop(i, j) == pytest.approx(expected)
            assert (latency[i, j], per_byte[i, j]) == pytest.approx(expected)


def test_equal_nodes_share_a_site():
    topology = Topology(DEVICES, region_links=REGIONS)
    assert LinkTable.of(topology).site.tolist() == [0, 0, 0, 1, 1]
    every_pair_is_the_topologys(topology)


def test_a_node_with_links_of_its_own_is_a_site():
    own = {("y", "z"): Link(0.5, 1e3), ("z", "y"): Link(0.6, 1e3), ("x", "x"): Link(0.0, 1e10)}
    topology = Topology(DEVICES, node_links=own, region_links=REGIONS)
    assert LinkTable.of(topology).site.tolist() == [0, 0, 1, 2, 3]
    every_pair_is_the_topologys(topology)


def test_a_window_slows_a_flow():
    far = Link(0.1, 1e9, window_bytes=1e6)
    table = LinkTable.of(Topology(DEVICES, region_links={("a", "b"): far, ("b", "a"): far}))
    assert table.hop(0, 3)[1] == pytest.approx(0.2 / 1e6)


def test_an_unknown_nic_is_as_fast_as_its_fastest_link():
    table = LinkTable.of(Topology(DEVICES, region_links=REGIONS))
    assert table.out_seconds_per_byte.tolist() == [1e-8, 1e-8, 8e-10, 8e-10]
    given = {"x": Uplink(2e6, 4e6)}
    table = LinkTable.of(Topology(DEVICES, region_links=REGIONS, node_uplinks=given))
    assert table.out_seconds_per_byte[0] == pytest.approx(1 / 2e6)
    assert table.in_seconds_per_byte[0] == pytest.approx(1 / 4e6)


def test_uplinks_between_regions():
    shared = {("a", "b"): 5e5, ("b", "nowhere"): 1.0}
    table = LinkTable.of(Topology(DEVICES, region_links=REGIONS, region_uplinks=shared))
    assert table.uplink_seconds_per_byte.tolist() == [[0, 2e-6], [0, 0]]


def test_no_link_is_infinitely_slow():
    table = LinkTable.of(Topology(DEVICES, default_link=None))
    assert table.hop(0, 3) == (math.inf, math.inf)
    assert table.hop(0, 1) == (LOCAL_LINK.latency_s, 1 / LOCAL_LINK.flow_bytes_per_s)
    assert table.hop(3, 4)[0] == DEFAULT_LINK.latency_s


def test_ten_thousand_devices_are_a_small_table():
    devices = tuple(
        Device(f"n{n}/{g}", f"n{n}", region=f"r{n % 16}") for n in range(1250) for g in range(8)
    )
    table = LinkTable.of(Topology(devices))
    assert table.latency_s.shape == (16, 16)
    assert len(table.site) == 10_000
