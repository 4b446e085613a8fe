"""Re-planning: from the plan in force to the next one, when devices leave or join.

::

    plan in force -> repairs, few layers move -------------.     .repair
                  -> local search from the best of them ----> event engine, with migration -> next
                  -> a plan from scratch, twins exchanged --'     .draft      .migration

Repairs answer at once.  The rest is for the background (``moves`` > 0), where the plan in force
stays unless another pays for its migration; and for when no repair fits, or one is cheap to beat.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from ray_train_geo.cluster.topology import Topology
from ray_train_geo.errors import PlanError
from ray_train_geo.planning.budget import Budget
from ray_train_geo.planning.constructions import Shape
from ray_train_geo.planning.draft import draft
from ray_train_geo.planning.evaluate import Chain, Evaluation, Evaluator, objective_value
from ray_train_geo.planning.local_search import improve, polish
from ray_train_geo.planning.migration import Horizon, MigrationEvaluator, with_least_moves
from ray_train_geo.planning.plan import Certificate, PipelinePlan, Plan
from ray_train_geo.planning.planner import search
from ray_train_geo.planning.predict import predict
from ray_train_geo.planning.problem import PlanOptions, Problem
from ray_train_geo.planning.refusal import check_count
from ray_train_geo.planning.repair import Broken, Repairer, State, allows
from ray_train_geo.planning.transition import Holdings, Layers, Transition
from ray_train_geo.planning.validate import validate_plan
from ray_train_geo.spec import JobSpec

__all__ = ["ReplanResult", "replan"]

_EVALUATED = 12_000
"""Devices in all repairs that are evaluated: 190 plans of 64 devices."""

_LEAST_EVALUATED = 40
"""So many repairs are evaluated however large the plan is."""

_WORTH = 0.005
"""Going on comes before mending, and mending before dissolving: unless the objective, relative,
is better by so much.  A closed form is not exact, and a new generation is not free."""

_FEW = 16
"""With so few devices a plan from scratch takes little time, and competes at once."""

_FAR_BETTER = 1.25
"""By how much it must then beat the best repair: it may move all layers."""


@dataclass(frozen=True, slots=True)
class ReplanResult:
    """The next plan.

    Args:
        plan: the plan in force itself, if it stays and is predicted to take as long as it was.
        transition: what must move before it runs.
        value: the objective with its share of the migration (`planning.migration`).
        considered: plans that were evaluated, not counting those of a search from scratch.
        reason: one sentence.
    """

    plan: Plan
    transition: Transition
    value: float
    considered: int
    reason: str


def replan(
    old: Plan,
    topology: Topology,
    job: JobSpec,
    vocab_size: int = 257,
    options: PlanOptions | None = None,
    budget: Budget | None = None,
    *,
    expected_s: float = 3600.0,
    overlapped: bool = False,
    moves: int = 0,
    leaving: Collection[str] = (),
    lost: Collection[str] = (),
) -> ReplanResult:
    """The next plan, after devices left or joined (or to see whether another pays by now).

    With ``moves`` 0 at most one pipeline's layers move for each device that left or is taken in,
    unless no such plan fits, or one from scratch is far better.

    Args:
        topology: as it is now.  Devices of ``old`` that are not in it have left.
        budget: of time; when it is spent the best plan so far is returned, and at least one.
        expected_s: expected time until the next change, in seconds; may be infinite.
        overlapped: the plan in force, if all its devices are there, trains on while layers move.
        moves: of the local search (instead of ``options.moves``); 0 is the fast answer.
        leaving: devices of ``topology`` that must not be used any more; they still give state away.
        lost: devices of ``topology`` whose state is gone, such as restarted ones.

    Raises:
        PlanError: ``old`` is of another model, ``expected_s`` is not positive, or nothing fits.
    """
    if not expected_s > 0:
        raise PlanError(f"expected_s is {expected_s}; give the seconds until the next change")
    staying = topology.with_devices(d for d in topology.devices if d.id not in leaving)
    problem = Problem.of(staying, job, vocab_size, replace(options or PlanOptions(), moves=moves))
    if old.layers != problem.dims.layers:
        raise PlanError(
            f"the plan in force has {old.layers} layers, but the model {problem.dims.layers}; "
            "plan from scratch"
        )
    check_count(problem)
    kept = _in_force(old, problem, vocab_size)
    meanwhile = None
    if overlapped and kept is not None and not set(lost) & {d.id for d in old.devices}:
        meanwhile = _value(kept, problem)
    holdings = Holdings.of(old, topology, problem.dims, lost)
    work = _Replanning(old, problem, holdings, Horizon(expected_s, meanwhile), budget or Budget())
    found = work.result(kept)
    validate_plan(found.plan, staying, job, vocab_size)
    return found


def _value(plan: Plan, problem: Problem) -> float:
    """The objective of ``plan``."""
    numbers = [problem.table.index[d.id] for d in plan.devices]
    return objective_value(problem, plan.predicted_step_s, numbers)


def _chain(pipeline: PipelinePlan, problem: Problem) -> Chain:
    """``pipeline``, whose devices are all there; codecs that are not allowed any more are open."""
    stages = pipeline.stages
    codecs = tuple(s.codec for s in stages[:-1])
    return Chain(
        tuple(problem.table.index[s.device] for s in stages),
        (0, *(s.layers[1] for s in stages)),
        codecs if set(codecs) <= set(problem.codecs) else None,
    )


def _in_force(old: Plan, problem: Problem, vocab_size: int) -> Plan | None:
    """``old`` with what is predicted of it now; None if it can't go on as it is."""
    job = problem.job
    try:
        validate_plan(old, problem.topology, job, vocab_size)
    except PlanError:
        return None
    chains = tuple(_chain(p, problem) for p in old.pipelines)
    counts = [p.microbatches for p in old.pipelines]
    if (
        old.schedule not in problem.schedules
        or old.gradient_sync not in (*problem.modes, *problem.late_modes)
        or any(c.codecs is None for c in chains)
        or job.parallelism.microbatches not in (None, counts)
        or not allows(Shape.of(problem), chains)
        or Evaluator(problem)(chains, (old.gradient_sync,), counts) is None
    ):
        return None
    step_s = predict(problem, old.pipelines, old.schedule, old.gradient_sync).step_s
    devices = tuple(problem.devices[d.id] for d in old.devices)
    if devices == old.devices and math.isclose(step_s, old.predicted_step_s, rel_tol=1e-9):
        return old
    now = replace(old, devices=devices, predicted_step_s=step_s)
    bound = Certificate(problem.options.objective, _value(now, problem), 0.0)
    return replace(now, certificate=bound)


class _Replanning:
    """A plan in force, and what is there now."""

    def __init__(
        self, old: Plan, problem: Problem, holdings: Holdings, horizon: Horizon, budget: Budget
    ) -> None:
        self._problem, self._holdings, self._horizon = problem, holdings, horizon
        self._budget = budget
        self._shape = Shape.of(problem)
        index, devices = problem.table.index, problem.topology.devices
        slots: list[Chain | None] = []
        self._broken: dict[int, Broken] = {}
        for slot, pipeline in enumerate(old.pipelines):
            whole = all(s.device in index for s in pipeline.stages)
            slots.append(_chain(pipeline, problem) if whole else None)
            if not whole:
                self._broken[slot] = [(index.get(s.device), s.layers) for s in pipeline.stages]
        used = {d.id for d in old.devices}
        idle = (i for i, d in enumerate(devices) if d.id not in used and problem.fits_any(d))
        self._start = State(tuple(slots), tuple(idle))
        self._left = len(used - index.keys())
        self._held: dict[int, Layers] = {
            i: run for i, d in enumerate(devices) if (run := holdings.layers(d.id)) is not None
        }
        self._considered = 0

    def result(self, kept: Plan | None) -> ReplanResult:
        """The best of the plan in force, repairs, and where they are looked at, all others."""
        unchanged = None if kept is None else self._weighed(kept, "the plan in force stays")
        moves = self._problem.options.moves
        if unchanged is not None and not self._start.spare and not moves:
            return unchanged
        best: ReplanResult | None = None
        repaired = self._repaired()
        if repaired is not None and repaired.found is not None:
            if kept is not None and not self._promises_more(repaired.found, kept):
                best = unchanged
            else:
                best = self._simulated(repaired.found, "repaired")
            if moves:
                improved = self._improved(repaired.found, repaired.spare, moves)
                best = _better(best, self._simulated(improved, "improved"))
        few = len(self._problem.devices) <= _FEW
        if best is None or ((moves or few) and not self._budget.spent()):
            anew = self._from_scratch(must=best is None)
            best = _better(best, anew, 1.0 if moves else _FAR_BETTER)
        assert best is not None  # what is made from scratch is there or has raised
        if unchanged is not None and best.value >= unchanged.value * (1 - _WORTH):
            best = unchanged
        return replace(best, considered=self._considered)

    def _evaluator(self, most_layers: int | None = None) -> MigrationEvaluator:
        kept = [chain for chain in self._start.slots if chain is not None]
        return MigrationEvaluator(
            self._problem, self._holdings, self._horizon, kept, most_layers, self._left
        )

    def _repaired(self) -> State | None:
        """The plan in force with its broken pipelines mended, or with them dissolved."""
        evaluator = self._evaluator(most_layers=self._problem.dims.layers)
        tries = max(_LEAST_EVALUATED, _EVALUATED // len(self._problem.devices))
        ways = 2 if self._broken else 1
        best: State | None = None
        for way in range(ways):
            repairer = Repairer(evaluator, self._held, tries // ways, self._budget.spent)
            repair = repairer.dissolve if way else repairer.mend
            state = repairer.use_spares(repair(self._start, self._broken))
            chains = tuple(chain for chain in state.slots if chain is not None)
            if state.found is None or not allows(self._shape, chains):
                continue
            if (
                best is None
                or best.found is None
                or state.found.value < best.found.value * (1 - _WORTH)
            ):
                best = state
        self._considered += evaluator.considered
        return best

    def _promises_more(self, found: Evaluation, kept: Plan) -> bool:
        """Whether ``found`` is better enough in closed form to be worth a run of the engine."""
        chains = tuple(_chain(p, self._problem) for p in kept.pipelines)
        counts = [p.microbatches for p in kept.pipelines]
        before = self._evaluator()(chains, (kept.gradient_sync,), counts)
        return before is None or found.value < before.value * (1 - _WORTH)

    def _improved(self, start: Evaluation, spare: Sequence[int], moves: int) -> Evaluation:
        """What the local search makes of the best repair."""
        evaluator, over = self._evaluator(), self._budget.spent
        seed = self._problem.options.seed
        better = improve(evaluator, start, sorted(spare), moves, seed, over)
        polished = polish(evaluator, better, over)
        self._considered += evaluator.considered
        return polished

    def _from_scratch(self, must: bool) -> ReplanResult | None:
        """A new plan, its devices placed so that few layers move.  Raises PlanError if it must."""
        problem = self._problem
        try:
            plan = search(problem, self._budget)
        except PlanError:
            if must:
                raise
            return None
        candidate = tuple(_chain(p, problem) for p in plan.pipelines)
        counts = [p.microbatches for p in plan.pipelines]
        settled = Evaluator(problem)(
            with_least_moves(candidate, problem, self._held), (plan.gradient_sync,), counts
        )
        if settled is not None:
            plan = draft(problem, settled)
        return self._weighed(plan, "planned from scratch")

    def _simulated(self, found: Evaluation, how: str) -> ReplanResult:
        return self._weighed(draft(self._problem, found), how)

    def _weighed(self, plan: Plan, how: str) -> ReplanResult:
        moved = self._holdings.moves_to(
            {s.device: s.layers for p in plan.pipelines for s in p.stages}
        )
        value = self._horizon.value(_value(plan, self._problem), moved.seconds)
        reason = (
            f"{how}: {self._left} left, {self._taken_in(plan)} taken in, "
            f"{moved.layers_moved} layers move in {moved.seconds:.3g} s"
        )
        return ReplanResult(plan, moved, value, 0, reason)

    def _taken_in(self, plan: Plan) -> int:
        return sum(self._holdings.layers(d.id) is None for d in plan.devices)


def _better(
    best: ReplanResult | None, other: ReplanResult | None, by: float = 1.0
) -> ReplanResult | None:
    """``other`` if it is better by a factor; the first of equals."""
    if best is None or other is None:
        return best or other
    # Nine digits: the order of sums must not decide between equals.
    ours, theirs = (
        (float(f"{value:.9g}"), result.plan.world_size)
        for value, result in ((best.value, best), (other.value * by, other))
    )
    return other if theirs < ours else best
