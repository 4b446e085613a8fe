from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from topologies import topologies

from ray_train_geo.cluster.random_topology import random_topology
from ray_train_geo.errors import SpecError


def test_the_arguments_decide():
    assert random_topology(1) == random_topology(1)
    assert random_topology(1) != random_topology(2)
    assert random_topology(1) != random_topology(-1)
    assert random_topology(10**30).devices


def test_it_is_the_same_on_every_machine():
    links = random_topology(5).region_links
    assert links["r0", "r1"].latency_s == 0.1692
    assert links["r0", "r1"].bandwidth_bytes_per_s == 0.421 * 1.25e8


@given(st.integers(0, 1000), st.integers(1, 40), st.integers(1, 6), st.sampled_from([1, 2, 8]))
def test_sizes(seed, devices, regions, gpus):
    t = random_topology(seed, devices, regions, (gpus,), ("T4", "V100"))
    assert len(t.devices) == devices
    assert len({d.region for d in t.devices}) == min(regions, devices)
    assert max(Counter(d.node for d in t.devices).values()) <= gpus
    assert {d.type for d in t.devices} <= {"T4", "V100-16G"}


@given(topologies(max_devices=12))
def test_farther_is_slower(topology):
    between = {pair: link for pair, link in topology.region_links.items() if pair[0] != pair[1]}
    for link in between.values():
        assert 0.003 < link.latency_s < 0.31  # half round the Earth is 268 ms, and 10% noise
        assert link.bandwidth_bytes_per_s <= 1.1 * 1.25 * 1.25e8
        assert 0.05e9 / 8 < link.latency_s * link.bandwidth_bytes_per_s < 0.1e9 / 8 or (
            link.bandwidth_bytes_per_s >= 0.9 * 1.25 * 1.25e8
        )
    for pair, rate in topology.region_uplinks.items():
        assert rate >= between[pair].bandwidth_bytes_per_s / 1.1
    for region in {d.region for d in topology.devices}:
        inside = topology.region_links[region, region].bandwidth_bytes_per_s
        nics = [topology.node_uplinks[d.node] for d in topology.devices if d.region == region]
        assert all(inside <= 1.1 * nic.out_bytes_per_s for nic in nics)


def test_without_noise_links_are_those_of_regions():
    t = random_topology(3)
    assert all(a == b for a, b in t.node_links)
    assert all(t.region_links[b, a] == link for (a, b), link in t.region_links.items())


def test_noise_is_of_every_link_and_bounded():
    plain, noisy = (
        random_topology(3, 8, gpus_per_node=(1,)),
        random_topology(3, 8, gpus_per_node=(1,), noise=0.1),
    )
    assert plain.devices == noisy.devices
    pairs = [(a, b) for a in noisy.devices for b in noisy.devices if a is not b]
    assert len({noisy.link(a, b).bandwidth_bytes_per_s for a, b in pairs}) == len(pairs)
    for a, b in pairs:
        ratio = noisy.link(a, b).bandwidth_bytes_per_s / plain.link(a, b).bandwidth_bytes_per_s
        assert 0.9 <= ratio <= 1.1


@pytest.mark.parametrize(
    "arguments",
    [
        {"devices": 0},
        {"regions": 0},
        {"gpus_per_node": ()},
        {"gpus_per_node": (0,)},
        {"types": ()},
        {"types": ("abacus",)},
        {"noise": 1.0},
        {"noise": -0.1},
    ],
)
def test_wrong_arguments_are_refused(arguments):
    with pytest.raises(SpecError):
        random_topology(0, **arguments)
