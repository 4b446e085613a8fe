"""The planner: a topology and a job in, a plan out.  Pure: no clock, no cluster, no chance.

::

    sketches, most promising first -> candidates -> closed-form cost      .constructions, .evaluate
    the best of them -> local search on real devices -> polish            .local_search
    the best few -> event engine -> the plan, and how good any could be   .draft, .certify

The search is anytime: the first candidate that fits is a valid plan, and better ones follow.  What
it finds depends on the problem, the seed and the moves alone, unless a deadline cuts it short.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import chain

from ray_train_geo.cluster.topology import Topology
from ray_train_geo.cluster.validate_topology import validate_topology
from ray_train_geo.planning.budget import Budget
from ray_train_geo.planning.certify import Bound, dollars_bound, step_time_bound
from ray_train_geo.planning.certify_modes import least_bound
from ray_train_geo.planning.constructions import Shape, candidates, sketches
from ray_train_geo.planning.cost import lower_bound_s
from ray_train_geo.planning.draft import draft
from ray_train_geo.planning.evaluate import Candidate, Chain, Evaluation, Evaluator
from ray_train_geo.planning.local_search import improve, polish
from ray_train_geo.planning.mixed_kinds import mixed_kinds
from ray_train_geo.planning.placement import place
from ray_train_geo.planning.plan import Plan
from ray_train_geo.planning.problem import PlanOptions, Problem
from ray_train_geo.planning.refusal import check_count, refusal
from ray_train_geo.planning.validate import validate_plan
from ray_train_geo.spec import JobSpec

__all__ = ["plan", "search"]

_STARTS = 2
"""Constructions that the local search starts from."""

_FINALISTS = 6
"""Plans that the event engine compares."""

_CONSTRUCTIONS = 100_000
"""Devices in all the constructions that are evaluated together: 1,500 plans of 64 devices."""

_TO_CONSTRUCT, _TO_SEARCH, _TO_CERTIFY, _TO_PROVE = 0.4, 0.7, 0.8, 0.95
"""By which parts of the budget constructions, local search, the choice, and the bound are done."""

_PATIENCE_S = 20.0
"""For the bound, of this process's own computing: others' load must not weaken a bound."""

_PROMISING = 1.02
"""A sketch whose compute alone takes this much longer than the best plan is not looked at."""


def plan(
    topology: Topology,
    job: JobSpec,
    vocab_size: int = 257,
    options: PlanOptions | None = None,
    budget: Budget | None = None,
    prove: bool = True,
) -> Plan:
    """The best plan found by ``options.objective`` (ties: fewer devices, then fewer stages).

    What ``job.parallelism`` fixes is obeyed; what it leaves to the planner is searched.
    ``search_s`` stays 0: the caller has the clock.

    Args:
        vocab_size: the tokenizer's, in tokens; for models that don't name their own.
        budget: of time; when it is spent the best plan so far is returned, and at least one.
        prove: look for a lower bound; without, the certificate's is 0.

    Raises:
        PlanError: too few devices, or no allowed plan fits; with what is short and what to do.
    """
    problem = Problem.of(topology, job, vocab_size, options)
    check_count(problem)
    validate_topology(topology)
    budget = budget or Budget()
    if problem.options.objective == "dtfm":
        from ray_train_geo.planning.dtfm_plan import dtfm_plan  # OR-tools: slow to import

        found = dtfm_plan(problem, budget)
    else:
        found = search(problem, budget)
        if prove:
            found = _certified(problem, found, budget)
    small = [d.id for d in problem.topology.devices if not problem.fits_any(d)]
    if small and not {d.id for d in found.devices} & set(small):
        note = f"too little memory for any layer: {', '.join(small)}"
        found = replace(found, notes=(*found.notes, note))
    validate_plan(found, topology, job, vocab_size)
    return found


def search(problem: Problem, budget: Budget) -> Plan:
    """The best plan found, by step time or dollars.  Raises PlanError if none fits."""
    evaluator = Evaluator(problem)
    pool = _constructed(problem, evaluator, lambda: budget.spent(_TO_CONSTRUCT))
    if not pool:
        raise refusal(problem)
    numbers = range(len(problem.topology.devices))
    usable = {d for d in numbers if problem.fits_any(problem.topology.devices[d])}
    moves, seed = problem.options.moves_for(len(usable)), problem.options.seed
    finalists = list(pool)
    for i, start in enumerate(pool[:_STARTS]):
        used = {d for p in start.pipelines for d in p.devices}
        share = moves // len(pool[:_STARTS])
        over = partial(
            budget.spent, _TO_CONSTRUCT + (_TO_SEARCH - _TO_CONSTRUCT) / _STARTS * (i + 1)
        )
        better = improve(evaluator, start, sorted(usable - used), share, seed + i, over)
        finalists.append(polish(evaluator, better, over))
    finalists.sort(key=lambda e: e.rank)
    best: tuple[Plan, Evaluation] | None = None
    for finalist in finalists[:_FINALISTS]:
        drafted = draft(problem, finalist)
        if best is None or _rank(drafted) < _rank(best[0]):
            best = drafted, finalist
        if budget.spent(_TO_SEARCH):
            break
    assert best is not None  # there is at least one finalist
    if problem.gpipe or problem.job.parallelism.extra_warmup is not None:
        return best[0]
    return min(best[0], draft(problem, best[1], less_warmup=1), key=_rank)


def _certified(problem: Problem, plan: Plan, budget: Budget) -> Plan:
    """``plan`` with the best bound there is time for."""
    assert plan.certificate is not None  # a draft has one, without a bound
    codecs = problem.codecs
    if budget.spent(_TO_CERTIFY):
        bound = Bound(0.0, "no time was left for a bound")
        if problem.options.objective == "step-time":
            least_s = lower_bound_s(problem.dims, problem.job.training, problem.topology.devices)
            bound = Bound(least_s, "all devices compute all the time; weak: there was no time")
    elif problem.options.objective == "dollars":
        bound = least_bound(problem, lambda p, modes: dollars_bound(p, modes, codecs))
    else:
        # A bound that took longer would change no plan, only what is known of it.
        patience = Budget(_PATIENCE_S, time.process_time)
        value = plan.certificate.value
        bound = least_bound(
            problem,
            lambda p, modes: step_time_bound(
                p, modes, codecs, lambda: patience.spent() or budget.spent(_TO_PROVE), value
            ),
        )
    value = plan.certificate.value
    certificate = replace(
        plan.certificate, lower_bound=min(bound.value, value), argument=bound.argument
    )
    return replace(plan, certificate=certificate)


def _rank(plan: Plan) -> tuple[float, int, int]:
    assert plan.certificate is not None  # a draft has one
    stages = max(len(p.stages) for p in plan.pipelines)
    return float(f"{plan.certificate.value:.9g}"), plan.world_size, stages


def _constructed(
    problem: Problem, evaluator: Evaluator, expired: Callable[[], bool]
) -> list[Evaluation]:
    """The best construction of each shape, best first."""
    usable = [i for i, device in enumerate(problem.topology.devices) if problem.fits_any(device)]
    best: dict[tuple[int, ...], Evaluation] = {}
    least = float("inf")
    left = _CONSTRUCTIONS
    seen: set[Candidate] = set()
    for bound_s, candidate in chain(
        _sketched(evaluator, usable, expired), _placed(problem, usable)
    ):
        if problem.options.objective == "step-time" and bound_s > _PROMISING * least:
            continue
        if candidate in seen:
            continue
        seen.add(candidate)
        found = evaluator(candidate)
        left -= sum(len(c.devices) for c in candidate)
        if found is not None:
            shape = tuple(sorted({len(c.devices) for c in candidate}))
            if shape not in best or found.rank < best[shape].rank:
                best[shape] = found
                least = min(least, found.step_s)
        if best and (left <= 0 or expired()):
            break
    return sorted(best.values(), key=lambda e: e.rank)


def _sketched(
    evaluator: Evaluator, usable: list[int], expired: Callable[[], bool]
) -> Iterator[tuple[float, Candidate]]:
    problem = evaluator.problem
    shape = Shape.of(problem)
    if shape.cuts is not None and len(shape.cuts) > 1:
        return  # pipelines of given, unequal depths: only placed by rule
    for candidate in mixed_kinds(problem, usable):
        yield 0.0, tuple(Chain(c.devices, shape.cut(i)) for i, c in enumerate(candidate))
    for sketch in sketches(evaluator, usable, expired):
        for candidate in candidates(problem, sketch):
            yield sketch.bound_s, candidate


def _placed(problem: Problem, usable: list[int]) -> Iterator[tuple[float, Candidate]]:
    """Plans by the placement rule, for every shape; last, because there are many."""
    shape, layers = Shape.of(problem), problem.dims.layers
    topology = problem.topology.with_devices(problem.topology.devices[d] for d in usable)
    most = min(len(usable), shape.max_devices or len(usable))
    shapes: Iterator[tuple[int, ...]]
    if shape.cuts is not None and len(shape.cuts) > 1:
        shapes = iter([tuple(len(cut) - 1 for cut in shape.cuts)])
    else:
        counts = range(1, most + 1) if shape.pipelines is None else [shape.pipelines]
        depths = range(1, layers + 1) if shape.stages is None else [shape.stages]
        shapes = ((d,) * p for p in counts for d in depths if d * p <= most)
    index = problem.table.index
    for wanted in shapes:
        if sum(wanted) <= most:
            chains = place(topology, wanted, problem.message_bytes)
            yield (
                0.0,
                tuple(
                    Chain(tuple(index[d.id] for d in devices), shape.cut(i))
                    for i, devices in enumerate(chains)
                ),
            )
