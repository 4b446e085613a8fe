"""Fleets: whose node is whose, how many there are when, and what a steady one would be."""

from __future__ import annotations

import pytest
from replay_cases import fleet, trace

from ray_train_geo.cluster.topology import Device, Topology
from ray_train_geo.cluster.traces import SpotTrace, TraceEvent
from ray_train_geo.errors import SpecError
from ray_train_geo.replay.fleet import Change, Hardware, fleet_of


def topology(*nodes: str) -> Topology:
    """``"region:node:type"``"""
    devices = []
    for text in nodes:
        region, node, kind = text.split(":")
        devices.append(Device(f"{node}/0", node, region, type=kind, flops_per_s=1e12))
    return Topology(tuple(devices))


def changes(text: str, max_nodes: int | None = None) -> list[tuple[float, str, str, str]]:
    """``(time_s, joined, left, noticed)``"""
    made = fleet_of(trace(text, 1000), Hardware("T4"), max_nodes=max_nodes)
    return [
        (c.time_s, "".join(c.joined), "".join(c.left), "".join(c.noticed)) for c in made.changes
    ]


def test_events_of_a_moment_are_one_change() -> None:
    assert changes("0+a 0+b 5!b 9-a 9+c 20-b 20+b") == [
        (0, "ab", "", ""),
        (5, "", "", "b"),
        (9, "c", "a", ""),
        (20, "b", "b", ""),
    ]


def test_who_would_be_one_too_many_waits() -> None:
    assert changes("0+a 0+b 0+c 5+d 9-c 12-a 20-b", max_nodes=2) == [
        (0, "ab", "", ""),
        (12, "d", "a", ""),
        (20, "", "b", ""),
    ]


def test_events_at_the_end_are_none() -> None:
    made = fleet("0+a 100-a", 100)
    assert made.changes == (Change(0.0, ("a",)),)


def test_device_seconds() -> None:
    made = fleet("10+a 20+b 40-a", 100, gpus=2)
    assert [(a, b, sorted(nodes)) for a, b, nodes in made.phases] == [
        (0, 10, []),
        (10, 20, ["a"]),
        (20, 40, ["a", "b"]),
        (40, 100, ["b"]),
    ]
    assert made.device_s(0, 100) == 2 * (30 + 80)
    assert made.device_s(15, 30) == 2 * (15 + 10)
    assert made.mean_devices == pytest.approx(2.2)
    assert made.typical() == {"b"}
    assert made.largest() == {"a", "b"}


def test_mean_intervals() -> None:
    made = fleet("0+a 0+b 10+c 20-a 20-b 30+d", 90)
    assert made.mean_interval_s("left") == 90
    assert made.mean_interval_s("left", "joined") == 30
    assert fleet("0+a", 90).mean_interval_s("left") == 90, "nobody left: once at the most"


def test_the_nodes_of_a_topology() -> None:
    where = topology("ohio:x:T4", "ohio:y:T4", "oregon:z:A10G")
    text = "0+p 0+y 5+q 6+r 8-p"
    made = fleet_of(trace(text, 10), topology=where)
    assert [(c.joined, c.left) for c in made.changes] == [
        (("x", "y"), ()),  # p is the first that is free; y is the one of its name
        (("z",), ()),
        (("x",), ("x",)),  # r waited for p to leave
    ]


def test_a_topology_s_node_must_be_what_the_trace_says() -> None:
    where = topology("ohio:x:T4", "oregon:z:A10G")
    events = (TraceEvent(0, "add", "p", "oregon"), TraceEvent(1, "add", "q", None, "T4"))
    made = fleet_of(SpotTrace("t", events, 9), topology=where)
    assert [c.joined for c in made.changes] == [("z",), ("x",)]
    wrong = SpotTrace("t", (TraceEvent(0, "add", "p", "ohio", "A10G"),), 9)
    with pytest.raises(SpecError, match="no node for p, which is A10G in ohio"):
        fleet_of(wrong, topology=where)


def test_regions_in_turn_and_their_links() -> None:
    made = fleet("0+a 0+b 0+c", 10, regions=("Ohio", "Virginia"))
    assert [d.region for d in made.topology.devices] == ["Ohio", "Virginia", "Ohio"]
    a, b, c = made.topology.devices
    assert made.topology.link(a, b).latency_s == 0.011
    assert made.topology.link(a, c).latency_s < 0.001


@pytest.mark.parametrize(
    ("hardware", "says"),
    [
        (Hardware(), "does not say what a is; give the GPU type"),
        (Hardware("V9"), "no GPU type 'V9'"),
        (Hardware("T4", 1, ("Ohio", "Atlantis")), "no link is known between Atlantis and Ohio"),
        (Hardware("T4", 1, ("Ohio", "Virgina")), "did you mean Virginia"),
    ],
)
def test_refused_hardware(hardware: Hardware, says: str) -> None:
    with pytest.raises(SpecError, match=says):
        fleet_of(trace("0+a 0+b", 10), hardware)


def test_a_trace_without_length() -> None:
    with pytest.raises(SpecError, match="ends when it begins; say until when"):
        fleet("0+a", 0)


def test_a_name_that_comes_back_as_another_kind() -> None:
    events = (
        TraceEvent(0, "add", "a", None, "T4"),
        TraceEvent(1, "remove", "a"),
        TraceEvent(2, "add", "a", None, "A10G"),
    )
    with pytest.raises(SpecError, match="a comes back as another kind of node"):
        fleet_of(SpotTrace("t", events, 9))


def test_a_steady_fleet_has_as_many_of_each_kind() -> None:
    events = [TraceEvent(0, "add", n, None, "T4") for n in "abc"]
    events += [TraceEvent(0, "add", n, None, "A10G") for n in "xyz"]
    events += [TraceEvent(40, "remove", n) for n in "abx"]
    made = fleet_of(SpotTrace("t", tuple(sorted(events, key=lambda e: e.time_s)), 100))
    # 1.8 T4s and 2.4 A10Gs: four nodes, and the larger remainder is the T4s'
    steady = made.steady()
    assert sorted(d.type for d in steady.topology.devices) == ["A10G", "A10G", "T4", "T4"]
    assert steady.changes == (Change(0.0, tuple(d.node for d in steady.topology.devices)),)
    assert fleet("99+a", 100).steady().mean_devices == 1
