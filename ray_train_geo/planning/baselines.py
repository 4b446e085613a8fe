"""What a plan has to beat: how others place the same job on the same devices.

All have as many equal pipelines as the devices give, even layers and equal shares of the batch:
none of these looks at compute, memory or links beyond what its placement does.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from itertools import pairwise

from ray_train_geo.planning.least_step import least_step_s
from ray_train_geo.planning.partition import even
from ray_train_geo.planning.pipeline_cost import hop_and_stage_times
from ray_train_geo.planning.plan import PipelinePlan, Plan, StagePlan
from ray_train_geo.planning.predict import predict
from ray_train_geo.planning.problem import Problem
from ray_train_geo.planning.warmup import choose_warmup
from ray_train_geo.schedule.zero_bubble import deferred_weights

__all__ = ["best_even_plan", "even_plan", "megatron_chains", "random_chains"]

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
    return _predicted(problem, _even_pipelines(problem, chains))


def best_even_plan(
    problem: Problem,
    placements: Iterable[Sequence[Sequence[int]]],
    below_s: float = math.inf,
    at_least: int = 1,
) -> Plan:
    """The fastest :func:`even_plan` of many, in the event engine (ties: the first).

    Those that can't be faster by what they must do at least are not simulated.  There must be one.

    Args:
        below_s: if no plan steps in less, any will do.
        at_least: so many are simulated for that, the most promising ones.
    """
    drawn = [_even_pipelines(problem, chains) for chains in placements]
    least_s = [least_step_s(problem, pipelines, problem.modes[0]) for pipelines in drawn]
    best: Plan | None = None
    for count, i in enumerate(sorted(range(len(drawn)), key=least_s.__getitem__)):
        if best is not None and least_s[i] >= best.predicted_step_s:
            break
        if count >= at_least and least_s[i] >= below_s:
            break
        found = _predicted(problem, drawn[i])
        if best is None or found.predicted_step_s < best.predicted_step_s:
            best = found
    if best is None:
        raise ValueError("no placements to choose from")
    return best


def _even_pipelines(problem: Problem, chains: Sequence[Sequence[int]]) -> list[PipelinePlan]:
    job, devices = problem.job, problem.topology.devices
    stages = len(chains[0])
    cut = even(problem.dims.layers, stages)
    shares = even(job.training.total_microbatches, len(chains))
    codecs = ("none",) * (stages - 1)
    pipelines = []
    for chain, (first, end) in zip(chains, pairwise(shares), strict=True):
        warmup: tuple[int, ...] = (end - first,) * stages
        deferred: tuple[int, ...] = (0,) * stages
        if not problem.gpipe:
            times = hop_and_stage_times(problem, chain, cut, codecs, problem.schedules[0])
            extra = job.parallelism.extra_warmup
            warmup = choose_warmup(times, end - first, warmup, extra)
            if times.weight_s is not None:
                room = (end - first,) * stages
                deferred = deferred_weights(times.tail_s, times.weight_s, room)
        held = zip(chain, pairwise(cut), warmup, deferred, strict=True)
        placed = tuple(
            StagePlan(devices[d].id, run, w, deferred=later) for d, run, w, later in held
        )
        pipelines.append(PipelinePlan(placed, end - first, first))
    return pipelines


def _predicted(problem: Problem, pipelines: Sequence[PipelinePlan]) -> Plan:
    schedule, sync = problem.schedules[0], problem.modes[0]
    return Plan(
        layers=problem.dims.layers,
        pipelines=tuple(pipelines),
        schedule=schedule,
        gradient_sync=sync,
        devices=tuple(problem.devices[s.device] for p in pipelines for s in p.stages),
        predicted_step_s=predict(problem, pipelines, schedule, sync).step_s,
    )
