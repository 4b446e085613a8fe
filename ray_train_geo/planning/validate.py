"""Promise 7: a plan fits, or is refused before it starts."""

from __future__ import annotations

from itertools import pairwise

from ray_train_geo.cluster.topology import Topology
from ray_train_geo.errors import PlanError
from ray_train_geo.planning.plan import Plan
from ray_train_geo.planning.problem import Problem
from ray_train_geo.spec import JobSpec

__all__ = ["validate_plan"]


def validate_plan(plan: Plan, topology: Topology, job: JobSpec, vocab_size: int = 257) -> None:
    """Check that ``plan`` can run: layer cover, batch arithmetic, devices, warmup and memory.

    Raises:
        PlanError: the first thing that is wrong, and where.
    """
    problem = Problem.of(topology, job, vocab_size)
    total = job.training.total_microbatches
    names = [stage.device for p in plan.pipelines for stage in p.stages]
    if unknown := [n for n in names if n not in problem.devices]:
        raise PlanError(f"the plan uses devices that are not there: {unknown}; plan again")
    if len(set(names)) < len(names):
        raise PlanError(f"the plan gives a device more than one stage: {sorted(names)}")
    if names != [d.id for d in plan.devices]:
        raise PlanError("the plan's devices are not those of its stages, in rank order")
    if plan.layers != problem.dims.layers:
        raise PlanError(
            f"the plan is for {plan.layers} layers, the model has {problem.dims.layers}"
        )
    first = 0
    for i, pipeline in enumerate(plan.pipelines):
        ends = [stage.layers for stage in pipeline.stages]
        if (
            not ends
            or ends[0][0] != 0
            or ends[-1][1] != plan.layers
            or any(a >= b for a, b in ends)
            or any(left[1] != right[0] for left, right in pairwise(ends))
        ):
            raise PlanError(f"pipeline {i} must hold layers 0-{plan.layers - 1} once: {ends}")
        if pipeline.microbatches < 1 or pipeline.first_microbatch != first:
            raise PlanError(
                f"pipeline {i} has microbatches {pipeline.first_microbatch} and "
                f"{pipeline.microbatches - 1} more; expected at least one, from {first} on"
            )
        first += pipeline.microbatches
        held = [min(s.warmup + 1, pipeline.microbatches) for s in pipeline.stages]
        if min(held) < 1 or any(a < b for a, b in pairwise(held)):
            raise PlanError(f"pipeline {i}: warmup grows along the pipeline, so it would deadlock")
        if plan.schedule == "gpipe":
            held = [pipeline.microbatches] * len(held)
        later = [0] * len(held)
        if plan.schedule == "zero-bubble":
            later = [min(s.deferred + 1, pipeline.microbatches) for s in pipeline.stages]
            if min(later) < 1:
                raise PlanError(f"pipeline {i}: deferred must not be negative")
        chain = [problem.devices[stage.device] for stage in pipeline.stages]
        problem.check_memory(i, ends, chain, held, len(plan.pipelines), later)
    if first != total:
        raise PlanError(f"the plan has {first} microbatches, but a step has {total}")
