"""The planner: a topology and a job in, a plan out.  Pure: no clock, no cluster, no randomness.

A *shape* is the depth of each pipeline.  Every shape that the job allows gets a bound that is
cheap to compute and never above its true time; shapes are built (placed, cut, simulated) best
bound first, until no bound is below the best predicted step::

    shapes -> bound -> place devices -> split microbatches -> cut layers -> warmup -> predict

How devices are placed is a rule, not a search: a pipeline stays in one region if it can.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

from ray_train_geo.cluster.topology import Device, Topology
from ray_train_geo.errors import PlanError
from ray_train_geo.model.catalog import ModelDims, boundary_bytes, layer_flops
from ray_train_geo.planning.cost import (
    PipelineTimes,
    backward_s,
    forward_s,
    lower_bound_s,
    pipeline_times,
    predict_step,
)
from ray_train_geo.planning.partition import weighted
from ray_train_geo.planning.placement import place
from ray_train_geo.planning.plan import PipelinePlan, Plan, StagePlan
from ray_train_geo.planning.problem import DoesNotFitError, Problem
from ray_train_geo.planning.validate import validate_plan
from ray_train_geo.schedule.one_f_one_b import warmup_forwards
from ray_train_geo.spec import JobSpec

__all__ = ["plan", "split_microbatches", "validate_plan"]

Boundaries = tuple[int, ...]


def plan(topology: Topology, job: JobSpec, vocab_size: int = 257) -> Plan:
    """The plan with the shortest predicted step (ties: fewer devices, then fewer stages).

    What ``job.parallelism`` fixes is obeyed; what it leaves to the planner is searched.
    ``search_s`` stays 0: the caller has the clock.

    Args:
        vocab_size: the tokenizer's, in tokens; for models that don't name their own.

    Raises:
        PlanError: too few devices, or no allowed plan fits; with what is short and what to do.
    """
    problem = Problem.of(topology, job, vocab_size)
    shapes = _shapes(problem)
    small = [d for d in topology.devices if not problem.fits_any(d)]
    usable = len(topology.devices) - len(small)
    if shapes_without_small := [depths for depths in shapes if sum(depths) <= usable]:
        kept = tuple(d for d in topology.devices if d not in small)
        problem = Problem.of(replace(topology, devices=kept), job, vocab_size)
        shapes = shapes_without_small
    best: Plan | None = None
    cutoff_s = math.inf
    nearest: DoesNotFitError | None = None
    for bound_s, depths in sorted((_bound_s(problem, depths), depths) for depths in shapes):
        if bound_s > cutoff_s:
            break
        try:
            candidate = _build(problem, depths, cutoff_s)
        except DoesNotFitError as e:
            if nearest is None or e.missing_bytes < nearest.missing_bytes:
                nearest = e
            continue
        if candidate is not None and (best is None or _rank(candidate) < _rank(best)):
            best = candidate
            cutoff_s = best.predicted_step_s * (1 + 1e-6)  # room for ties
    if best is None:
        assert nearest is not None  # _shapes gives at least one shape, and each fits or not
        intro = "" if len(shapes) == 1 else f"none of {len(shapes)} possible plans fits; nearest: "
        raise PlanError(f"{intro}{nearest} {_advice(job, problem.dims)}")
    if small and best.world_size <= usable:
        names = ", ".join(d.id for d in small)
        best = replace(best, notes=(*best.notes, f"too little memory for any layer: {names}"))
    validate_plan(best, topology, job, vocab_size)
    return best


def split_microbatches(total: int, period_s: Sequence[float]) -> tuple[int, ...]:
    """Share ``total`` microbatches among pipelines in proportion to speed, at least one each.

    Args:
        period_s: seconds per microbatch of each pipeline.

    Raises:
        ValueError: fewer microbatches than pipelines.
    """
    if total < len(period_s):
        raise ValueError(f"{total} microbatches are too few for {len(period_s)} pipelines")
    speed = [1 / p for p in period_s]
    counts = [max(1, int(total * v / sum(speed))) for v in speed]
    everyone = range(len(counts))
    while sum(counts) < total:  # to who is done with one more the earliest
        counts[min(everyone, key=lambda i: ((counts[i] + 1) * period_s[i], i))] += 1
    while sum(counts) > total:  # from who is done last
        givers = [i for i in everyone if counts[i] > 1]
        counts[max(givers, key=lambda i: (counts[i] * period_s[i], i))] -= 1
    return tuple(counts)


def _bound_s(problem: Problem, depths: tuple[int, ...]) -> float:
    """A time that no plan of this shape can beat: compute, spread evenly or in the best cut."""
    training = problem.job.training
    by_speed = sorted(problem.topology.devices, key=lambda d: -d.flops_per_s)
    fastest = by_speed[: sum(depths)]
    flops = 3 * layer_flops(problem.dims, training.seq_len, training.microbatch)
    largest_run = -(-problem.dims.layers // max(depths))
    busiest = -(-training.total_microbatches // len(depths))
    by_stage = busiest * largest_run * flops / fastest[0].flops_per_s
    return max(by_stage, lower_bound_s(problem.dims, training, fastest))


def _rank(candidate: Plan) -> tuple[float, int, int]:
    # Nine digits: sums in another order must not decide between equal plans.
    stages = max(len(p.stages) for p in candidate.pipelines)
    return float(f"{candidate.predicted_step_s:.9g}"), candidate.world_size, stages


def _shapes(problem: Problem) -> list[tuple[int, ...]]:
    """The depths of the pipelines of every plan that the job and the number of devices allow."""
    job, layers = problem.job, problem.dims.layers
    there = len(problem.topology.devices)
    usable = min(there, job.scaling.max_devices or there)
    if there < job.scaling.min_devices:
        raise PlanError(
            f"too few devices: scaling.min_devices is {job.scaling.min_devices}, but there are "
            f"{there}; add devices or lower min_devices"
        )
    boundaries, pipelines = job.stage_boundaries(), job.fixed_pipelines()
    if boundaries is not None and len(boundaries) > 1:
        shapes = [tuple(len(b) - 1 for b in boundaries)]
    else:
        stages = job.parallelism.stages
        if boundaries is not None:
            stages = len(boundaries[0]) - 1
        most = min(usable, job.training.total_microbatches)
        counts = range(1, most + 1) if pipelines is None else [pipelines]
        depths = range(1, min(usable, layers) + 1) if stages is None else [stages]
        shapes = [(s,) * p for p in counts for s in depths]
    fitting = [shape for shape in shapes if sum(shape) <= usable]
    if not fitting:
        least = min(shapes, key=sum, default=(job.parallelism.stages or 1,))
        limit = "" if usable == there else f" (scaling.max_devices; {there} are there)"
        raise PlanError(
            f"too few devices: {len(least)} pipeline(s) of {_counts(least)} stage(s) need "
            f"{sum(least)}, but {usable} may be used{limit}; add devices, or ask for fewer "
            "pipelines or stages in parallelism"
        )
    return fitting


def _counts(values: Sequence[int]) -> str:
    return ", ".join(map(str, sorted(set(values))))


def _build(problem: Problem, depths: tuple[int, ...], cutoff_s: float) -> Plan | None:
    """The plan of one shape, or None if it is slower than ``cutoff_s``.

    Raises:
        DoesNotFitError: a stage is too large for its device.
    """
    job, dims, training = problem.job, problem.dims, problem.job.training
    size = boundary_bytes(dims, training.seq_len, training.microbatch, training.precision)
    chains = place(problem.topology, depths, size)

    fixed = job.stage_boundaries()
    fixed_cuts = (
        None if fixed is None else [tuple(fixed[i % len(fixed)]) for i in range(len(depths))]
    )
    if job.parallelism.microbatches is not None:
        microbatches = tuple(job.parallelism.microbatches)
    else:
        # Speeds as if memory did not matter: what memory allows depends on the microbatches.
        free = fixed_cuts or [_cut_freely(problem, chain) for chain in chains]
        periods = [_times(problem, c, b).period_s for c, b in zip(chains, free, strict=True)]
        microbatches = split_microbatches(training.total_microbatches, periods)

    pipelines: list[PipelinePlan] = []
    notes: list[str] = []
    first = 0
    for i, (chain, count) in enumerate(zip(chains, microbatches, strict=True)):
        if fixed_cuts is not None:
            cut = fixed_cuts[i]
        else:
            cut = _cut_for_memory(problem, chain, count, len(depths))
        stages = _stages(problem, i, chain, cut, count, len(depths), notes)
        pipelines.append(PipelinePlan(stages, count, first))
        first += count

    devices = tuple(device for chain in chains for device in chain)
    prediction = predict_step(
        dims,
        training,
        pipelines,
        job.parallelism.schedule,
        job.parallelism.gradient_sync,
        problem.topology,
        problem.devices,
        cutoff_s,
    )
    if prediction is None:
        return None
    return Plan(
        layers=dims.layers,
        pipelines=tuple(pipelines),
        schedule=job.parallelism.schedule,
        gradient_sync=job.parallelism.gradient_sync,
        devices=devices,
        predicted_step_s=prediction.step_s,
        lower_bound_s=lower_bound_s(dims, training, devices),
        notes=tuple(notes),
    )


def _times(problem: Problem, chain: Sequence[Device], cut: Boundaries) -> PipelineTimes:
    runs = list(pairwise(cut))
    return pipeline_times(problem.dims, problem.job.training, runs, chain, problem.topology)


def _cut(
    problem: Problem, chain: Sequence[Device], max_layers: Sequence[int] | None = None
) -> Boundaries | None:
    """The cut with the fastest slowest stage; None if ``max_layers`` can't be obeyed."""
    dims, training = problem.dims, problem.job.training

    def work(layer: int, device: Device) -> float:
        run = layer, layer + 1
        seconds = forward_s(dims, training, run, device) + backward_s(dims, training, run, device)
        return seconds * device.flops_per_s

    costs = [work(0, chain[0])]
    if dims.layers > 1:
        inner = work(1, chain[0]) if dims.layers > 2 else 0.0
        costs += [inner] * (dims.layers - 2) + [work(dims.layers - 1, chain[-1])]
    return weighted(costs, [d.flops_per_s for d in chain], max_layers)


def _cut_freely(problem: Problem, chain: Sequence[Device]) -> Boundaries:
    cut = _cut(problem, chain)
    assert cut is not None  # there are at least as many layers as stages
    return cut


def _cut_for_memory(
    problem: Problem, chain: Sequence[Device], microbatches: int, pipelines: int
) -> Boundaries:
    """The best cut that fits with the schedule's usual activations, or else with the fewest.

    Where none fits: the best cut regardless, so that what is short of it can be told.
    """
    stages = len(chain)
    usual = [min(stages - s, microbatches) for s in range(stages)]
    attempts = [[microbatches] * stages] if problem.gpipe else [usual, [1] * stages]
    for in_flight in attempts:
        max_layers = [
            problem.most_layers(s, stages, held, device, pipelines)
            for s, (device, held) in enumerate(zip(chain, in_flight, strict=True))
        ]
        cut = _cut(problem, chain, max_layers)
        if cut is not None:
            return cut
    return _cut_freely(problem, chain)


def _stages(
    problem: Problem,
    pipeline: int,
    chain: Sequence[Device],
    cut: Boundaries,
    microbatches: int,
    pipelines: int,
    notes: list[str],
) -> tuple[StagePlan, ...]:
    """Stages with their warmup and memory; adds to ``notes``.  Raises DoesNotFitError."""
    runs = list(pairwise(cut))
    least = microbatches if problem.gpipe else 1
    problem.check_memory(pipeline, runs, chain, [least] * len(chain), pipelines)
    if problem.gpipe:
        warmup = in_flight = [microbatches] * len(chain)
    else:
        times = _times(problem, chain, cut)

        def warmups(max_in_flight: Sequence[int]) -> list[int]:
            return warmup_forwards(
                len(chain),
                microbatches,
                times.hop_s(),
                times.forward_s,
                times.backward_s,
                max_in_flight,
                problem.job.parallelism.extra_warmup,
            )

        room = [
            problem.most_in_flight(run, device, microbatches, pipelines)
            for run, device in zip(runs, chain, strict=True)
        ]
        warmup, wanted = warmups(room), warmups([microbatches] * len(chain))
        if warmup != wanted:
            notes.append(f"pipeline {pipeline}: memory limits warmup to {warmup}, not {wanted}")
        in_flight = [w + 1 for w in warmup]
    return tuple(
        StagePlan(
            device=device.id,
            layers=run,
            warmup=w,
            memory_bytes=problem.memory(run, held, device, pipelines).total,
        )
        for run, device, w, held in zip(runs, chain, warmup, in_flight, strict=True)
    )


def _advice(job: JobSpec, dims: ModelDims) -> str:
    options = []
    if (job.parallelism.stages or 1) < dims.layers or job.parallelism.layers is not None:
        options.append("more stages (more devices, or fewer layers on this one)")
    if job.training.microbatch > 1:
        options.append(f"a smaller training.microbatch than {job.training.microbatch}")
    if not job.training.recompute:
        options.append("training.recompute: true")
    if job.parallelism.schedule == "gpipe":
        options.append("parallelism.schedule: 1f1b")
    options.append("devices with more memory")
    return f"Use {', or '.join(options)}."
