"""What a job learns of a Ray node; no Ray runs here."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ray_train_geo.actors import discovery
from ray_train_geo.actors.discovery import Node, devices_on, live_nodes
from ray_train_geo.cluster.gpus import gpu
from ray_train_geo.spec import ScalingSpec

NODE = Node(
    id="0123456789abcdef",
    hostname="host",
    machine=("host",),
    labels={"ray.io/availability-region": "ohio", "ray.io/accelerator-type": "A100"},
    total={"GPU": 2, "CPU": 8, "memory": 64e9},
    free={"GPU": 2, "CPU": 8, "memory": 64e9},
)
ONE_GPU = ScalingSpec(resources_per_worker={"GPU": 1})


def test_a_gpu_of_the_catalog():
    devices = devices_on(NODE, ONE_GPU, None)
    large = gpu("A100-80G")  # Ray does not say which one: the larger, until it is measured
    assert [d.id for d in devices] == ["456789abcdef/0", "456789abcdef/1"]
    for d in devices:
        assert (d.type, d.region, d.node) == ("A100", "ohio", NODE.id)
        assert d.flops_per_s == large.sustained_flops_per_s("fp16")
        assert d.memory_bytes == large.memory_bytes
        assert d.price_per_hour == large.price_per_hour("on-demand")
        assert d.flops_by_precision == ()  # what is measured later must count at every precision


def test_spot_nodes_cost_less():
    spot = replace(NODE, labels={**NODE.labels, "ray.io/market-type": "spot"})
    device = devices_on(spot, ONE_GPU, None)[0]
    assert device.market_type == "spot"
    assert device.price_per_hour == gpu("A100-80G").price_per_hour("spot")


def test_a_share_of_a_gpu():
    halves = devices_on(NODE, ScalingSpec(resources_per_worker={"GPU": 0.5}), None)
    assert len(halves) == 4
    whole = devices_on(NODE, ONE_GPU, None)[0]
    for attribute in ("flops_per_s", "memory_bytes", "price_per_hour"):
        assert getattr(halves[0], attribute) == pytest.approx(getattr(whole, attribute) / 2)


@pytest.mark.parametrize("accelerator", ["", "B300"])
def test_an_unknown_gpu_has_room_until_it_is_measured(accelerator):
    node = replace(NODE, labels={"ray.io/accelerator-type": accelerator})
    device = devices_on(node, ONE_GPU, None)[0]
    assert device.type == (accelerator or "gpu")
    assert (device.flops_per_s, device.memory_bytes, device.price_per_hour) == (1e13, 2**50, 0)


def test_memory_that_the_job_gives_wins():
    scaling = ScalingSpec(resources_per_worker={"GPU": 1}, memory_per_worker_bytes=10**10)
    assert devices_on(NODE, scaling, None)[0].memory_bytes == 10**10


def test_a_cpu_node_shares_its_memory():
    devices = devices_on(NODE, ScalingSpec(resources_per_worker={"CPU": 1}), 4)
    assert len(devices) == 8
    assert (devices[0].type, devices[0].memory_bytes) == ("cpu", 16 * 10**9)
    assert (devices[0].flops_per_s, devices[0].price_per_hour) == (2e10, 0)


def test_a_machine_keeps_its_name_when_it_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def machines(*nodes: tuple[str, str]) -> list[tuple[str, ...]]:
        alive = [
            {
                "NodeID": f"id{i}",
                "Alive": True,
                "NodeManagerAddress": address,
                "NodeManagerHostname": "host",
                "NodeName": name,
                "Resources": {},
            }
            for i, (address, name) in enumerate(nodes)
        ]
        monkeypatch.setattr(discovery.ray, "nodes", lambda: alive)
        monkeypatch.setattr("ray._private.state.available_resources_per_node", dict)
        return [node.machine for node in live_nodes()]

    assert machines(("10.0.0.1", "a"), ("10.0.0.2", "b")) == [("10.0.0.1", "a"), ("10.0.0.2", "b")]
    assert machines(("10.0.0.1", "a"), ("10.0.0.1", "b")) == [("id0",), ("id1",)]
    assert machines(("127.0.0.1", "a")) == [("id0",)], "nodes of one machine: which is it?"
