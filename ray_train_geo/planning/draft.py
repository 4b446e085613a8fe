"""From an evaluated candidate to a plan that can run: warmup, memory and notes for each stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np

from ray_train_geo.planning.evaluate import Evaluation, objective_value
from ray_train_geo.planning.local_cost import step_groups
from ray_train_geo.planning.pipeline_cost import (
    PipelineCost,
    choose_deferred,
    hop_and_stage_times,
)
from ray_train_geo.planning.plan import Certificate, PipelinePlan, Plan, StagePlan
from ray_train_geo.planning.predict import Prediction, predict, resynced
from ray_train_geo.planning.problem import Problem
from ray_train_geo.planning.shard_sizes import stage_weights
from ray_train_geo.planning.warmup import choose_warmup
from ray_train_geo.spec import GradientSyncName, ScheduleName

__all__ = ["draft"]


def draft(problem: Problem, found: Evaluation, less_warmup: int = 0) -> Plan:
    """The plan of ``found``, with the step that the event engine predicts; no bound yet.

    Of the schedules that the job allows it has the one with the shortest step (ties: the first).

    Args:
        less_warmup: forwards that every stage runs fewer before its first backward than the
            rule says; over long hops the rule may take one too many.
    """
    first, *others = problem.schedules
    best = _drafted(problem, found, first, less_warmup)
    assert best is not None  # it was evaluated under the first, and fits
    for schedule in others:
        other = _drafted(problem, found, schedule, less_warmup)
        if other is not None and other.predicted_step_s < best.predicted_step_s:
            best = other
    return best


def _drafted(
    problem: Problem, found: Evaluation, schedule: ScheduleName, less_warmup: int
) -> Plan | None:
    """None if some stage has no memory for what ``schedule`` holds."""
    pipelines: list[PipelinePlan] = []
    notes: list[str] = []
    first = 0
    for i, (cost, count) in enumerate(zip(found.pipelines, found.microbatches, strict=True)):
        stages = _stages(
            problem, schedule, i, cost, count, len(found.pipelines), less_warmup, notes
        )
        if stages is None:
            return None
        pipelines.append(PipelinePlan(stages, count, first))
        first += count
    prediction = predict(problem, pipelines, schedule, found.gradient_sync)
    mode, prediction, pipelines = _best_sync(problem, found.gradient_sync, prediction, pipelines)
    shards = [stage.shard for p in pipelines for stage in p.stages]
    if min(shards) < max(shards):
        notes.append(
            "shards of gradient sums by the speed of links: "
            f"{min(shards):.2f} to {max(shards):.2f} times an equal one"
        )
    numbers = [d for p in found.pipelines for d in p.devices]
    value = objective_value(problem, prediction.step_s, numbers)
    return Plan(
        layers=problem.dims.layers,
        pipelines=tuple(pipelines),
        schedule=schedule,
        gradient_sync=mode,
        devices=tuple(problem.topology.devices[d] for d in numbers),
        predicted_step_s=prediction.step_s,
        certificate=Certificate(problem.options.objective, value, 0.0),
        notes=tuple(notes),
    )


def _best_sync(
    problem: Problem,
    mode: GradientSyncName,
    prediction: Prediction,
    pipelines: list[PipelinePlan],
) -> tuple[GradientSyncName, Prediction, list[PipelinePlan]]:
    """What the search has chosen, unless one that it does not look at is predicted to be faster.

    Those are the late modes, and a sharded PS with shards by the speed of links.
    """
    tried = [(late, pipelines) for late in problem.late_modes if late != mode]
    if problem.shards_by_speed:
        tried.append(("sharded_ps", _with_shards(problem, pipelines)))
    best = mode, prediction, pipelines
    for other, changed in tried:
        after = resynced(problem, changed, other, prediction)
        # Nine digits: the order of sums must not decide between equals.
        if float(f"{after.step_s:.9g}") < float(f"{best[1].step_s:.9g}"):
            best = other, after, changed
    return best


def _with_shards(problem: Problem, pipelines: Sequence[PipelinePlan]) -> list[PipelinePlan]:
    """``pipelines``, the holders of whose layers make shards by the speed of their links."""
    index = problem.table.index
    chains = [[index[stage.device] for stage in p.stages] for p in pipelines]
    cuts = [(0, *(stage.layers[1] for stage in p.stages)) for p in pipelines]
    devices = np.array([d for chain in chains for d in chain])
    groups = step_groups(problem, chains, cuts)
    weights = iter(stage_weights(groups, devices, problem.table).tolist())
    return [
        replace(p, stages=tuple(replace(stage, shard=next(weights)) for stage in p.stages))
        for p in pipelines
    ]


def _stages(
    problem: Problem,
    schedule: ScheduleName,
    pipeline: int,
    cost: PipelineCost,
    microbatches: int,
    pipelines: int,
    less_warmup: int,
    notes: list[str],
) -> tuple[StagePlan, ...] | None:
    """Stages with their warmup and memory for the microbatches they got; adds to ``notes``.

    None if they don't fit.
    """
    devices = [problem.topology.devices[d] for d in cost.devices]
    runs = list(pairwise(cost.cut))
    count = len(devices)
    later = (0,) * count
    at_once = list(later)
    if schedule == "gpipe":
        warmup = (microbatches,) * count
        in_flight = list(warmup)
    else:
        times, split = cost.times, schedule == "zero-bubble"
        if split and times.weight_s is None:
            times = hop_and_stage_times(problem, cost.devices, cost.cut, cost.codecs, schedule)
        extra = problem.job.parallelism.extra_warmup
        room = [
            problem.most_in_flight(run, device, microbatches, pipelines, int(split))
            for run, device in zip(runs, devices, strict=True)
        ]
        if min(room) < 1:
            return None
        warmup = choose_warmup(times, microbatches, room, extra)
        wanted = choose_warmup(times, microbatches, [microbatches] * count, extra)
        if warmup != wanted:
            notes.append(
                f"pipeline {pipeline}: memory limits warmup to {list(warmup)}, not {list(wanted)}"
            )
        warmup = tuple(max(0, w - less_warmup) for w in warmup)
        in_flight = [w + 1 for w in warmup]
        if split:
            of = cost.devices, cost.cut, times, warmup, microbatches, pipelines
            later = choose_deferred(problem, *of)
            at_once = [min(d + 1, microbatches) for d in later]
    return tuple(
        StagePlan(
            device=device.id,
            layers=run,
            warmup=w,
            memory_bytes=problem.memory(run, held, device, pipelines, put_off).total,
            codec=codec,
            deferred=d,
        )
        for run, device, w, d, held, put_off, codec in zip(
            runs, devices, warmup, later, in_flight, at_once, (*cost.codecs, "none"), strict=True
        )
    )
