from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from topologies import topologies

from ray_train_geo.cluster.topology import Device, Link, Topology, Uplink
from ray_train_geo.cluster.validate_topology import validate_network, validate_topology
from ray_train_geo.errors import InputError, SpecError

LINK = Link(0.01, 1e8)


def device(name: str, region: str, **fields) -> Device:
    return Device(f"{name}/0", name, region, **fields)


def both(a: str, b: str, link: Link = LINK) -> dict[tuple[str, str], Link]:
    return {(a, b): link, (b, a): link}


A, A2, B, C = device("a", "x"), device("a2", "x"), device("b", "y"), device("c", "z")
GOOD = Topology((A, B), region_links=both("x", "y"), default_link=None)


def test_good_ones():
    validate_topology(GOOD)
    validate_topology(Topology((A, B)))  # the default joins them
    validate_topology(Topology((A, A2), default_link=None))  # one region has its own
    validate_topology(replace(GOOD, node_links={("a", "a"): Link(0.0, 1e9)}))


@given(topologies(max_devices=12))
def test_random_ones_are_good(topology):
    validate_topology(topology)


def test_a_link_of_nodes_may_differ_from_the_way_back_by_region():
    validate_topology(replace(GOOD, node_links={("a", "b"): LINK}))


def test_links_of_all_nodes_join_regions():
    links = both("a", "b") | both("a2", "b")
    validate_topology(Topology((A, A2, B), links, default_link=None))


BAD = (0.0, -1.0, math.nan, math.inf)


@pytest.mark.parametrize(
    ("topology", "message"),
    [
        (Topology(()), "no devices"),
        (Topology((A, A)), "device 'a/0' is given 2 times"),
        (
            Topology((A, replace(A, id="a/1", region="y"))),
            "device 'a/1': node 'a' is in 'x' already, so not in 'y'",
        ),
        *((Topology((replace(A, flops_per_s=x),)), "device 'a/0': flops_per_s is") for x in BAD),
        (Topology((replace(A, memory_bytes=0),)), "device 'a/0': memory_bytes is 0"),
        (
            Topology((replace(A, flops_by_precision=(("fp16", math.nan),)),)),
            "device 'a/0': FLOP/s at fp16 is nan",
        ),
        *(
            (Topology((replace(A, price_per_hour=x),)), "device 'a/0': price_per_hour is")
            for x in BAD[1:]
        ),
        *(
            (replace(GOOD, region_links=both("x", "y", Link(x, 1.0))), "link x -> y: latency is")
            for x in BAD[1:]
        ),
        *(
            (replace(GOOD, region_links=both("x", "y", Link(0.0, x))), "link x -> y: bandwidth is")
            for x in BAD
        ),
        (
            replace(GOOD, region_links=both("x", "y", Link(0.0, 1.0, 0.0))),
            "link x -> y: window is 0.0 bytes",
        ),
        (
            replace(GOOD, node_links={("a", "a"): Link(0.0, 0.0)}),
            "link of nodes a -> a: bandwidth is 0.0",
        ),
        (replace(GOOD, default_link=Link(math.nan, 1.0)), "default_link: latency is nan"),
        *((replace(GOOD, node_uplinks={"a": Uplink(1.0, x)}), "uplink into node 'a'") for x in BAD),
        *((replace(GOOD, region_uplinks={("x", "y"): x}), "uplink x -> y") for x in BAD),
        (Topology((A, B), region_links={("x", "y"): LINK}), "link x -> y is one-way"),
        (Topology((A, A2), {("a", "a2"): LINK}), "link of nodes a -> a2 is one-way"),
        (
            Topology((A, B, C), region_links=both("x", "y"), default_link=None),
            "no link joins the islands {x, y}; {z}: add links",
        ),
        (
            Topology((A, B, C), region_links=both("x", "y") | both("y", "z"), default_link=None),
            "no link x -> z: name one, or a default_link\nno link z -> x",
        ),
    ],
)
def test_wrong_ones_are_refused_with_the_reason(topology, message):
    with pytest.raises(SpecError) as e:
        validate_topology(topology)
    assert message in str(e.value)
    assert isinstance(e.value, InputError)


def test_many_faults_are_counted():
    with pytest.raises(SpecError) as e:
        validate_topology(Topology(tuple(device(f"n{i}", "x", flops_per_s=0) for i in range(25))))
    lines = str(e.value).splitlines()
    assert len(lines) == 11
    assert lines[-1] == "and 15 more"


def test_a_network_needs_no_devices():
    validate_network(Topology((), region_links=both("x", "y"), node_links={("a", "b"): LINK}))
    with pytest.raises(SpecError, match="one-way"):
        validate_network(Topology((), region_links={("x", "y"): LINK}))


def test_an_integer_too_large_for_a_float_is_a_number():
    validate_topology(Topology((replace(A, memory_bytes=10**400),)))
