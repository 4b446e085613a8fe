"""Where a step is simulated: exactly one place."""

from __future__ import annotations

import math
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest

from ray_train_geo.cluster.topology import Device, Topology
from ray_train_geo.cluster.topology_file import dump_topology
from ray_train_geo.errors import SpecError
from ray_train_geo.systems.place import place

TWO = Topology((Device("a/0", "a"), Device("b/0", "b")))


def test_a_scenario_by_either_name() -> None:
    assert place("worldwide") == place("case5") == ("worldwide", None)


def test_a_topology_or_its_file(tmp_path: Path) -> None:
    path = tmp_path / "two.yaml"
    dump_topology(TWO, path)
    assert place(topology=TWO) == (None, TWO)
    for given in (path, str(path)):
        name, found = place(topology=given)
        assert name is None
        assert found is not None
        assert [d.id for d in found.devices] == ["a/0", "b/0"]


@pytest.mark.parametrize("bandwidth_gbps", [1.0, 4.0])
def test_equal_devices_on_equal_links(bandwidth_gbps: float) -> None:
    name, found = place(devices=3, latency_ms=10, bandwidth_gbps=bandwidth_gbps)
    assert name is None
    assert found is not None
    assert len(found.devices) == 3
    links = {found.link(a, b) for a, b in permutations(found.devices, 2)}
    (link,) = links
    assert link.latency_s == pytest.approx(0.01)
    # Links of the measured runs carried a little more than they were set to.
    assert 1 <= link.bandwidth_bytes_per_s / (bandwidth_gbps * 1.25e8) < 1.2


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({}, "nowhere to simulate: give a scenario, a topology, or devices"),
        ({"scenario": "worldwide", "topology": TWO}, "a scenario and a topology: .* one of them"),
        ({"scenario": "worldwide", "devices": 3}, "a scenario and devices"),
        ({"devices": 3}, "latency_ms and bandwidth_gbps missing"),
        ({"latency_ms": 0.0, "bandwidth_gbps": 1.0}, "devices missing"),
        ({"devices": 0, "latency_ms": 1.0, "bandwidth_gbps": 1.0}, "devices is 0"),
        ({"devices": 2, "latency_ms": -1.0, "bandwidth_gbps": 1.0}, "latency_ms is -1.0"),
        ({"devices": 2, "latency_ms": math.nan, "bandwidth_gbps": 1.0}, "latency_ms is nan"),
        ({"devices": 2, "latency_ms": 1.0, "bandwidth_gbps": 0.0}, "bandwidth_gbps is 0.0"),
        ({"devices": 2, "latency_ms": 1.0, "bandwidth_gbps": math.inf}, "Gbit/s above 0"),
        ({"topology": "no-such.yaml"}, "no-such.yaml"),
    ],
)
def test_refused(given: dict[str, Any], says: str) -> None:
    with pytest.raises(SpecError, match=says):
        place(**given)
