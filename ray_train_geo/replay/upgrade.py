"""From the plan in force to one made from scratch: who takes which place in it."""

from __future__ import annotations

from dataclasses import replace

from ray_train_geo.cluster.topology import Topology
from ray_train_geo.planning.evaluate import Chain
from ray_train_geo.planning.migration import with_least_moves
from ray_train_geo.planning.plan import Plan
from ray_train_geo.planning.problem import Problem
from ray_train_geo.planning.request import PlanRequest
from ray_train_geo.planning.transition import Holdings, Transition

__all__ = ["upgrade"]


def upgrade(
    asked: PlanRequest, scratch: Plan, in_force: Plan, topology: Topology
) -> tuple[Plan, Transition]:
    """``scratch`` with twins exchanged so that few layers move, and what must move to it.

    Its prediction stays: twins take the same time wherever they stand.

    Args:
        topology: as it is now; the devices of ``in_force`` that are in it hold their state.
    """
    problem = Problem.of(topology, asked.job, asked.vocab_size, asked.options)
    index, devices = problem.table.index, problem.topology.devices
    holdings = Holdings.of(in_force, topology, problem.dims)
    held = {i: run for d, i in index.items() if (run := holdings.layers(d)) is not None}
    candidate = tuple(
        Chain(
            tuple(index[stage.device] for stage in p.stages),
            (0, *(stage.layers[1] for stage in p.stages)),
        )
        for p in scratch.pipelines
    )
    chains = [chain.devices for chain in with_least_moves(candidate, problem, held)]
    pipelines = tuple(
        replace(
            p,
            stages=tuple(
                replace(stage, device=devices[d].id)
                for stage, d in zip(p.stages, chain, strict=True)
            ),
        )
        for p, chain in zip(scratch.pipelines, chains, strict=True)
    )
    used = tuple(devices[d] for chain in chains for d in chain)
    stages = {stage.device: stage.layers for p in pipelines for stage in p.stages}
    return replace(scratch, pipelines=pipelines, devices=used), holdings.moves_to(stages)
