"""Which device is which rank: the placements of the published systems."""

from __future__ import annotations

import random
from functools import cache

from ray_train_geo.cluster.scenarios import scenario
from ray_train_geo.cluster.topology import Topology
from ray_train_geo.planning.planner import plan
from ray_train_geo.planning.request import request

__all__ = ["Grid", "dtfm_grid", "megatron_grid", "shuffled", "shuffled_nodes"]

Grid = tuple[tuple[tuple[int, ...], ...], ...]
"""``[replicas][stages][tensor]``; numbers of devices."""


def megatron_grid(order: list[int], tensor: int, stages: int) -> Grid:
    """Megatron-LM's and DeepSpeed's: tensor ranks are neighbours, then replicas, then stages.

    (Narayanan et al., SC 2021.)

    Args:
        order: device numbers by rank.
    """
    replicas = len(order) // (tensor * stages)
    return tuple(
        tuple(
            tuple(order[(s * replicas + r) * tensor + t] for t in range(tensor))
            for s in range(stages)
        )
        for r in range(replicas)
    )


def shuffled(devices: int, seed: int) -> list[int]:
    """Devices in random order."""
    order = list(range(devices))
    random.Random(seed).shuffle(order)
    return order


def shuffled_nodes(topology: Topology, seed: int) -> list[int]:
    """Nodes in random order, each node's devices next to each other."""
    members: dict[str, list[int]] = {}
    for i, device in enumerate(topology.devices):
        members.setdefault(device.node, []).append(i)
    nodes = list(members)
    random.Random(seed).shuffle(nodes)
    return [i for node in nodes for i in members[node]]


def dtfm_grid(name: str, topology: Topology, stages: int, replicas: int) -> Grid:
    """DT-FM's schedule: the placement that minimises its cost on the nominal figures.

    Args:
        name: of the scenario, if it is one: its schedules are kept.

    Raises:
        PlanError: there is no such placement.
    """
    if name:
        return _scheduled(name, stages, replicas)
    return _schedule(topology, stages, replicas)


@cache
def _scheduled(name: str, stages: int, replicas: int) -> Grid:
    return _schedule(scenario(name), stages, replicas)


def _schedule(topology: Topology, stages: int, replicas: int) -> Grid:
    # DT-FM's cost knows neither layers nor memory nor batch: any small model will do.
    asked = request(
        model="gpt3-small",
        overrides=(f"model.layers={max(stages, 2)}",),
        topology=topology,
        global_batch=replicas,
        stages=stages,
        replicas=replicas,
        objective="dtfm",
    )
    found = plan(topology, asked.job, asked.vocab_size, asked.options, prove=False)
    number = {d.id: i for i, d in enumerate(topology.devices)}
    return tuple(
        tuple((number[stage.device],) for stage in pipeline.stages) for pipeline in found.pipelines
    )
