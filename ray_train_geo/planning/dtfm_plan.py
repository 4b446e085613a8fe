"""The plan that DT-FM's objective prefers: its placement, with even layers where they fit."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from ray_train_geo.planning.budget import Budget
from ray_train_geo.planning.constructions import Shape
from ray_train_geo.planning.draft import draft
from ray_train_geo.planning.dtfm_assignment import dtfm_assignment
from ray_train_geo.planning.evaluate import Chain, Evaluator
from ray_train_geo.planning.partition import even
from ray_train_geo.planning.plan import Certificate, Plan
from ray_train_geo.planning.problem import Problem
from ray_train_geo.planning.refusal import refusal

__all__ = ["dtfm_plan"]

_STAGES = 8  # as in all of DT-FM's experiments


def dtfm_plan(problem: Problem, budget: Budget) -> Plan:
    """The placement with the lowest DT-FM cost that was found, and the proof if there is one.

    Stages are 8 and pipelines as many as there are devices for, unless the job fixes them.

    Raises:
        PlanError: fewer devices than stages, or the model does not fit this placement.
    """
    shape, count = Shape.of(problem), len(problem.topology.devices)
    stages = shape.stages or min(_STAGES, problem.dims.layers, count // (shape.pipelines or 1))
    pipelines = shape.pipelines or min(count // stages, problem.job.training.total_microbatches)
    assign = partial(dtfm_assignment, problem.topology, stages, pipelines, deadline=budget.spent)
    if problem.options.moves is not None:
        assign = partial(assign, moves=problem.options.moves)
    found = assign(seed=problem.options.seed)
    index, evaluator = problem.table.index, Evaluator(problem)
    chains = [tuple(index[d] for d in chain) for chain in found.pipelines]
    for cut in (shape.cut(0) or even(problem.dims.layers, stages), None):
        evaluation = evaluator(tuple(Chain(chain, cut) for chain in chains))
        if evaluation is not None:
            certificate = Certificate("dtfm", found.cost.total_s, found.lower_bound, found.argument)
            return replace(draft(problem, evaluation), certificate=certificate)
    raise refusal(problem)
