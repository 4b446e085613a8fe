"""Why there is no plan: too few devices, or too little memory; what is short, and what to do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

from ray_train_geo.errors import PlanError
from ray_train_geo.planning.constructions import Shape
from ray_train_geo.planning.partition import even
from ray_train_geo.planning.placement import place
from ray_train_geo.planning.problem import DoesNotFitError, Problem

__all__ = ["check_count", "refusal"]


def check_count(problem: Problem) -> None:
    """Check that there are devices enough for what the job fixes.

    Raises:
        PlanError: there are not.
    """
    job, shape = problem.job, Shape.of(problem)
    there = len(problem.topology.devices)
    usable = min(there, shape.max_devices or there)
    if there < job.scaling.min_devices:
        raise PlanError(
            f"too few devices: scaling.min_devices is {job.scaling.min_devices}, but there are "
            f"{there}; add devices or lower min_devices"
        )
    depths = _least(shape)
    if sum(depths) > usable:
        limit = "" if usable == there else f" (scaling.max_devices; {there} are there)"
        counts = ", ".join(map(str, sorted(set(depths))))
        raise PlanError(
            f"too few devices: {len(depths)} pipeline(s) of {counts} stage(s) need "
            f"{sum(depths)}, but {usable} may be used{limit}; add devices, or ask for fewer "
            "pipelines or stages in parallelism"
        )


def refusal(problem: Problem) -> PlanError:
    """The error for a problem that no plan was found for: the plan that is short of least."""
    nearest: DoesNotFitError | None = None
    tried = 0
    for depths in _shapes(problem):
        tried += 1
        try:
            _check(problem, depths)
        except DoesNotFitError as e:
            if nearest is None or e.missing_bytes < nearest.missing_bytes:
                nearest = e
    options = problem.options
    if nearest is None:
        budget = options.max_dollars_per_hour
        asked = f" for at most {budget} dollars per hour" if budget is not None else ""
        return PlanError(
            f"no plan was found on {len(problem.topology.devices)} devices{asked}; allow more "
            "devices or a higher price, or fix less in parallelism"
        )
    intro = "" if tried == 1 else "no plan fits; nearest: "
    return PlanError(f"{intro}{nearest} {_advice(problem)}")


def _least(shape: Shape) -> tuple[int, ...]:
    """Depths of the smallest plan that the job allows."""
    if shape.cuts is not None and len(shape.cuts) > 1:
        return tuple(len(cut) - 1 for cut in shape.cuts)
    return (shape.stages or 1,) * (shape.pipelines or 1)


def _shapes(problem: Problem) -> Iterator[tuple[int, ...]]:
    """The depths of plans with as few pipelines as allowed."""
    shape = Shape.of(problem)
    least = _least(shape)
    if shape.stages is not None or shape.cuts is not None:
        yield least
        return
    usable = len(problem.topology.devices)
    most = min(usable, shape.max_devices or usable) // len(least)
    for depth in range(1, min(problem.dims.layers, most) + 1):
        yield (depth,) * len(least)


def _check(problem: Problem, depths: Sequence[int]) -> None:
    """Raises DoesNotFitError if the usual placement and an even cut do not fit."""
    shape, total = Shape.of(problem), problem.job.training.total_microbatches
    for i, chain in enumerate(place(problem.topology, depths, problem.message_bytes)):
        cut = shape.cut(i) or even(problem.dims.layers, len(chain))
        held = -(-total // len(depths)) if problem.gpipe else 1
        runs = list(pairwise(cut))
        problem.check_memory(i, runs, chain, [held] * len(chain), len(depths))


def _advice(problem: Problem) -> str:
    job, options = problem.job, []
    if (job.parallelism.stages or 1) < problem.dims.layers or job.parallelism.layers is not None:
        options.append("more stages (more devices, or fewer layers on this one)")
    if job.training.microbatch > 1:
        options.append(f"a smaller training.microbatch than {job.training.microbatch}")
    if not job.training.recompute:
        options.append("training.recompute: true")
    if job.parallelism.schedule in ("gpipe", "zero-bubble"):
        options.append("parallelism.schedule: 1f1b")
    options.append("devices with more memory")
    return f"Use {', or '.join(options)}."
