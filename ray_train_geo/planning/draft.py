"""From an evaluated candidate to a plan that can run: warmup, memory and notes for each stage."""

from __future__ import annotations

from itertools import pairwise

from ray_train_geo.planning.evaluate import Evaluation, objective_value
from ray_train_geo.planning.pipeline_cost import PipelineCost
from ray_train_geo.planning.plan import Certificate, PipelinePlan, Plan, StagePlan
from ray_train_geo.planning.predict import predict
from ray_train_geo.planning.problem import Problem
from ray_train_geo.planning.warmup import choose_warmup

__all__ = ["draft"]


def draft(problem: Problem, found: Evaluation) -> Plan:
    """The plan of ``found``, with the step that the event engine predicts; no bound yet."""
    pipelines: list[PipelinePlan] = []
    notes: list[str] = []
    first = 0
    for i, (cost, count) in enumerate(zip(found.pipelines, found.microbatches, strict=True)):
        stages = _stages(problem, i, cost, count, len(found.pipelines), notes)
        pipelines.append(PipelinePlan(stages, count, first))
        first += count
    schedule = problem.job.parallelism.schedule
    prediction = predict(problem, pipelines, schedule, found.gradient_sync)
    numbers = [d for p in found.pipelines for d in p.devices]
    value = objective_value(problem, prediction.step_s, numbers)
    if prediction.static_shares:
        notes.append("predicted with constant shares of NICs and uplinks: the plan is large")
    return Plan(
        layers=problem.dims.layers,
        pipelines=tuple(pipelines),
        schedule=schedule,
        gradient_sync=found.gradient_sync,
        devices=tuple(problem.topology.devices[d] for d in numbers),
        predicted_step_s=prediction.step_s,
        certificate=Certificate(problem.options.objective, value, 0.0),
        notes=tuple(notes),
    )


def _stages(
    problem: Problem,
    pipeline: int,
    cost: PipelineCost,
    microbatches: int,
    pipelines: int,
    notes: list[str],
) -> tuple[StagePlan, ...]:
    """Stages with their warmup and memory for the microbatches they got; adds to ``notes``."""
    devices = [problem.topology.devices[d] for d in cost.devices]
    runs = list(pairwise(cost.cut))
    count = len(devices)
    if problem.gpipe:
        warmup = (microbatches,) * count
        in_flight = list(warmup)
    else:
        extra = problem.job.parallelism.extra_warmup
        room = [
            problem.most_in_flight(run, device, microbatches, pipelines)
            for run, device in zip(runs, devices, strict=True)
        ]
        warmup = choose_warmup(cost.times, microbatches, room, extra)
        wanted = choose_warmup(cost.times, microbatches, [microbatches] * count, extra)
        if warmup != wanted:
            notes.append(
                f"pipeline {pipeline}: memory limits warmup to {list(warmup)}, not {list(wanted)}"
            )
        in_flight = [w + 1 for w in warmup]
    return tuple(
        StagePlan(
            device=device.id,
            layers=run,
            warmup=w,
            memory_bytes=problem.memory(run, held, device, pipelines).total,
            codec=codec,
        )
        for run, device, w, held, codec in zip(
            runs, devices, warmup, in_flight, (*cost.codecs, "none"), strict=True
        )
    )
