"""Which nodes become hosts, and how slow their links are."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from ray_train_geo.cluster.scenarios import scenario
from ray_train_geo.cluster.topology import Device, Link, Topology, Uplink
from ray_train_geo.cluster.topology_file import dump_topology, load_topology
from ray_train_geo.errors import SpecError
from ray_train_geo.lab.emulate import network, some_nodes
from ray_train_geo.lab.fabric import Shape
from ray_train_geo.lab.network import Network


def test_hosts_are_spread_over_the_regions() -> None:
    chosen = some_nodes(scenario("worldwide"), 12)
    count = Counter(d.region for d in chosen.devices)
    assert len(count) == 8
    assert sorted(count.values()) == [1] * 4 + [2] * 4
    regions = [d.region for d in chosen.devices]
    assert regions == sorted(regions, key=regions.index), "hosts of a region are neighbours"


def test_what_is_left_is_a_topology_of_its_own(tmp_path: Path) -> None:
    chosen = some_nodes(scenario("worldwide"), 3, 0.1)
    dump_topology(chosen, tmp_path / "three.yaml")
    assert network(load_topology(tmp_path / "three.yaml")) == network(chosen)


def test_a_node_of_many_devices_is_one_host() -> None:
    found = scenario("datacenter")
    assert [d.node for d in some_nodes(found).devices] == list(
        dict.fromkeys(d.node for d in found.devices)
    )


def test_bandwidths_and_windows_are_scaled_and_latencies_are_not() -> None:
    whole, tenth = (some_nodes(scenario("worldwide"), 8, s) for s in (1.0, 0.1))
    for pair, link in whole.region_links.items():
        small = tenth.region_links[pair]
        assert small.latency_s == link.latency_s
        assert small.flow_bytes_per_s == pytest.approx(link.flow_bytes_per_s / 10)
        assert small.bandwidth_bytes_per_s == pytest.approx(link.bandwidth_bytes_per_s / 10)
    for node, nic in whole.node_uplinks.items():
        assert tenth.node_uplinks[node].out_bytes_per_s == pytest.approx(nic.out_bytes_per_s / 10)


def test_links_nics_and_uplinks_of_a_network() -> None:
    devices = tuple(Device(f"{n}/0", n, r) for n, r in (("a", "x"), ("b", "x"), ("c", "y")))
    topology = Topology(
        devices,
        node_links={("a", "b"): Link(0.001, 5e6)},
        region_links={
            ("x", "x"): Link(0.002, 4e6),
            ("x", "y"): Link(0.1, 3e6, window_bytes=2e5),
            ("y", "x"): Link(0.2, 2e6),
        },
        node_uplinks={"c": Uplink(1e6, 9e6)},
        region_uplinks={("x", "y"): 7e5},
    )
    found = network(topology)
    assert [h.region for h in found.hosts] == ["x", "x", "y"]
    assert len({h.address for h in found.hosts}) == 3
    assert found.links[0, 1] == Shape(0.001, 5e6, 5e6)
    assert found.links[1, 0] == Shape(0.002, 4e6, 4e6)
    assert found.links[0, 2] == Shape(0.1, 3e6, 1e6), "a window a round trip"
    assert found.links[2, 1] == Shape(0.2, 2e6, 2e6)
    shared = {s.name: (s.bytes_per_s, set(s.pairs)) for s in found.shared}
    assert shared["uplink from x to y"] == (pytest.approx(7e5), {(0, 2), (1, 2)})
    assert shared["NIC out of c"] == (pytest.approx(1e6), {(2, 0), (2, 1)})
    assert shared["NIC into c"] == (pytest.approx(9e6), {(0, 2), (1, 2)})
    assert shared["NIC out of a"][0] == pytest.approx(5e6), "as fast as its fastest link"
    assert Network.from_json(found.to_json()) == found


def test_names_are_of_hosts_or_regions() -> None:
    found = network(some_nodes(scenario("regional"), 8))
    assert found.numbers("virginia-1") == [1]
    assert found.numbers("Oregon") == [2, 3]
    with pytest.raises(SpecError, match=r"no host or region 'Mars'.*virginia-0"):
        found.numbers("Mars")


@pytest.mark.parametrize("count", [0, -1, 65])
def test_more_hosts_than_nodes_are_refused(count: int) -> None:
    with pytest.raises(SpecError, match=rf"{count} hosts: the topology has 64 nodes"):
        some_nodes(scenario("worldwide"), count)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scale_is_above_zero(scale: float) -> None:
    with pytest.raises(SpecError, match="above 0"):
        some_nodes(scenario("worldwide"), 2, scale)


def test_hosts_without_a_link_are_refused() -> None:
    devices = (Device("a/0", "a", "x"), Device("b/0", "b", "y"))
    with pytest.raises(SpecError, match="no link from a to b"):
        network(Topology(devices, default_link=None))
