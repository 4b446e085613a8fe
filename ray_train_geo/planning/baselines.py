"""What a plan has to beat: how others place the same job on the same devices.

All have as many equal pipelines as the devices give, even layers and equal shares of the batch:
none of these looks at compute, memory or links beyond what its placement does.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise

from ray_train_geo.planning.partition import even
from ray_train_geo.planning.pipeline_cost import hop_and_stage_times
from ray_train_geo.planning.plan import PipelinePlan, Plan, StagePlan
from ray_train_geo.planning.predict import predict
from ray_train_geo.planning.problem import Problem
from ray_train_geo.planning.warmup import choose_warmup

__all__ = ["even_plan", "megatron_chains", "random_chains"]

Chains = tuple[tuple[int, ...], ...]


def megatron_chains(problem: Problem, stages: int) -> Chains:
    """Megatron-LM's default: ranks in the order of nodes, a stage's replicas next to each other.

    Its groups without tensor parallelism (Narayanan et al., SC 2021): pipeline ``p`` is the ranks
    ``p, p + D, p + 2D, ...`` of ``D`` pipelines.
    """
    replicas = len(problem.topology.devices) // stages
    return tuple(tuple(p + s * replicas for s in range(stages)) for p in range(replicas))


def random_chains(problem: Problem, stages: int, seed: int) -> Chains:
    """As :func:`megatron_chains`, of devices in random order."""
    order = list(range(len(problem.topology.devices)))
    random.Random(seed).shuffle(order)
    return tuple(tuple(order[d] for d in chain) for chain in megatron_chains(problem, stages))


def even_plan(problem: Problem, chains: Sequence[Sequence[int]]) -> Plan:
    """The plan of ``chains`` (device numbers) with even layers and equal shares of the batch.

    It gets the first gradient-sync mode that the job allows, and as much warmup as helps: memory
    is not looked at, because those that such plans come from do not either.
    """
    job, devices = problem.job, problem.topology.devices
    stages = len(chains[0])
    cut = even(problem.dims.layers, stages)
    shares = even(job.training.total_microbatches, len(chains))
    codecs = ("none",) * (stages - 1)
    pipelines = []
    for chain, (first, end) in zip(chains, pairwise(shares), strict=True):
        warmup: tuple[int, ...] = (end - first,) * stages
        if not problem.gpipe:
            times = hop_and_stage_times(problem, chain, cut, codecs)
            extra = job.parallelism.extra_warmup
            warmup = choose_warmup(times, end - first, warmup, extra)
        held = zip(chain, pairwise(cut), warmup, strict=True)
        placed = tuple(StagePlan(devices[d].id, run, w) for d, run, w in held)
        pipelines.append(PipelinePlan(placed, end - first, first))
    schedule, sync = job.parallelism.schedule, problem.modes[0]
    step_s = predict(problem, pipelines, schedule, sync).step_s
    return Plan(
        layers=problem.dims.layers,
        pipelines=tuple(pipelines),
        schedule=schedule,
        gradient_sync=sync,
        devices=tuple(devices[d] for chain in chains for d in chain),
        predicted_step_s=step_s,
    )
