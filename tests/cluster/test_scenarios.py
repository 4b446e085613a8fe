from __future__ import annotations

from collections import Counter
from itertools import combinations

import pytest

from ray_train_geo.cluster.random_topology import random_topology
from ray_train_geo.cluster.scenarios import SCENARIOS, scenario
from ray_train_geo.cluster.topology import Topology
from ray_train_geo.cluster.validate_topology import validate_topology
from ray_train_geo.errors import SpecError

V100_CASES = ("datacenter", "datacenter-spot", "universities", "regional", "worldwide")


def by_region(t: Topology) -> dict[str, int]:
    return dict(Counter(d.region for d in t.devices))


def node_sizes(t: Topology) -> dict[int, int]:
    """How many nodes there are of each number of devices."""
    return dict(Counter(Counter(d.node for d in t.devices).values()))


def link(t: Topology, a: str, b: str) -> tuple[float, float]:
    """Milliseconds and Gbit/s between the first devices of two regions, or two nodes of one."""
    first = {d.node: d for d in reversed(t.devices)}.values()
    source = next(d for d in first if d.region == a)
    target = next(d for d in first if d.region == b and d is not source)
    found = t.link(source, target)
    return pytest.approx(found.latency_s * 1e3), pytest.approx(found.bandwidth_bytes_per_s * 8e-9)


def nics_gbps(t: Topology) -> set[float]:
    assert t.node_uplinks.keys() == {d.node for d in t.devices}
    assert all(u.in_bytes_per_s == u.out_bytes_per_s for u in t.node_uplinks.values())
    return {round(u.out_bytes_per_s * 8e-9, 6) for u in t.node_uplinks.values()}


@pytest.mark.parametrize("name", [*SCENARIOS, "random-0"])
def test_each_is_valid_and_has_readable_names(name):
    t = scenario(name)
    validate_topology(t)
    assert t.default_link is None
    assert t == scenario(name)
    for d in t.devices:
        prefix, _, number = d.id.partition("/")
        assert d.node == prefix
        assert number.isdigit()


@pytest.mark.parametrize("name", V100_CASES)
def test_dtfm_cases_have_64_v100s(name):
    t = scenario(name)
    assert Counter(d.type for d in t.devices) == {"V100-16G": 64}
    market = "on-demand" if name == "datacenter" else "spot"
    assert {d.market_type for d in t.devices} == {market}


def test_datacenter():
    t = scenario("datacenter")
    assert node_sizes(t) == {8: 8}
    assert nics_gbps(t) == {25}
    assert link(t, "Virginia", "Virginia") == (0, 3.125)
    inside = t.link(t.devices[0], t.devices[1])
    assert (inside.latency_s, inside.bandwidth_bytes_per_s) == (0, 12.5e9)


def test_datacenter_spot():
    t = scenario("datacenter-spot")
    assert node_sizes(t) == {4: 8, 1: 32}
    assert nics_gbps(t) == {10}
    rates = Counter(
        round(t.link(a, b).bandwidth_bytes_per_s * 8e-9, 6) for a, b in combinations(t.devices, 2)
    )
    assert rates == {100: 8 * 6, 1.25: 64 * 63 // 2 - 8 * 6}


def test_universities():
    t = scenario("universities")
    assert by_region(t) == {"Ohio": 32, "Virginia": 32}
    assert node_sizes(t) == {1: 64}
    assert nics_gbps(t) == {10}
    assert link(t, "Ohio", "Ohio") == link(t, "Virginia", "Virginia") == (1, 5)
    assert link(t, "Ohio", "Virginia") == link(t, "Virginia", "Ohio") == (11, 1.12)


def test_regional():
    t = scenario("regional")
    assert by_region(t) == dict.fromkeys(("Virginia", "Oregon", "California", "Ohio"), 16)
    assert node_sizes(t) == {1: 64}
    assert link(t, "California", "California") == (5, 2)
    assert link(t, "Oregon", "California") == (12, 1.25)
    assert link(t, "Virginia", "Oregon") == (67, 1.15), "as configured, not as in the table"
    assert link(t, "California", "Virginia") == (59, 1.05)


def test_worldwide():
    t = scenario("worldwide")
    assert len(by_region(t)) == 8
    assert set(by_region(t).values()) == {8}
    assert t.device("tokyo-3/0").node == "tokyo-3"
    assert link(t, "Tokyo", "Tokyo") == (5, 2)
    assert link(t, "Seoul", "London") == link(t, "London", "Seoul") == (238, 0.342)
    assert link(t, "Ireland", "Oregon") == (124, 0.482)


def test_wan_flows_have_a_window():
    for name in ("universities", "regional", "worldwide", "mixed"):
        for (a, b), found in scenario(name).region_links.items():
            assert found.window_bytes == (16.6e6 if a != b else float("inf"))


def test_fluidstack_2():
    t = scenario("fluidstack-2")
    assert by_region(t) == {"east": 16, "mid": 16}
    assert node_sizes(t) == {2: 16}
    assert {d.type for d in t.devices} == {"A40"}
    assert nics_gbps(t) == {9.5, 10.5}
    assert link(t, "east", "east") == (0.5, 9.5)
    assert link(t, "mid", "mid") == (0.5, 10.5)
    assert link(t, "mid", "east") == (20, 3.34)
    assert link(t, "east", "mid") == (20, 3.03)
    assert t.region_uplinks == {("mid", "east"): 3.34 * 1.25e8, ("east", "mid"): 3.03 * 1.25e8}


def test_fluidstack_3():
    t = scenario("fluidstack-3")
    assert by_region(t) == {"east": 16, "mid": 16, "west": 16}
    assert node_sizes(t) == {2: 24}
    assert link(t, "west", "west") == link(t, "mid", "mid") == (0.5, 10.5)
    assert link(t, "east", "west") == (60.2, 0.15)
    assert link(t, "west", "east") == (60.2, 1.17)
    assert link(t, "mid", "west") == (39.7, 0.16)
    assert t.region_uplinks["mid", "west"] == 0.16 * 1.25e8
    assert len(t.region_uplinks) == 6


def test_mixed():
    t = scenario("mixed")
    kinds = Counter((d.region, d.type) for d in t.devices)
    assert kinds == {
        ("Virginia", "A100-40G"): 32,
        ("Oregon", "V100-16G"): 64,
        ("Ireland", "T4"): 32,
    }
    assert node_sizes(t) == {8: 12, 4: 8}
    assert link(t, "Virginia", "Oregon") == (67, 0.79)


def test_random():
    assert scenario("random-7") == random_topology(7)
    assert scenario("random--7") == random_topology(-7)


@pytest.mark.parametrize("name", ["worldwid", "random-", "random-x", ""])
def test_an_unknown_name_is_refused_with_the_list(name):
    with pytest.raises(SpecError, match=r"no scenario .*datacenter, .*mixed, random-SEED") as e:
        scenario(name)
    assert ("did you mean worldwide?" in str(e.value)) == (name == "worldwid")
