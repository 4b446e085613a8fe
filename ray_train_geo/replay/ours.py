"""Ours: plan anew for who is there, stream what is missing, replay the step that was cut off.

::

    a device that trains vanishes    step step st| detect, plan, stream, rebuild | step step
    a node joins, or is warned       step step step step|rebuild|step step step
                                          '--plan, stream--'

A repair of the plan in force answers at once; a plan from scratch is looked for in the background,
and takes over at the end of a step if that pays before the next change is due.  A layer that no
live device holds comes from its in-memory copy on another node, and only if that is gone too from
the newest checkpoint.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection
from dataclasses import dataclass

from ray_train_geo.errors import PlanError
from ray_train_geo.planning.budget import Budget
from ray_train_geo.planning.migration import Horizon
from ray_train_geo.planning.plan import Plan
from ray_train_geo.planning.replan import ReplanResult, replan
from ray_train_geo.planning.transition import Transition
from ray_train_geo.replay.assumptions import OursCosts
from ray_train_geo.replay.checkpoints import Checkpoints
from ray_train_geo.replay.fleet import Change
from ray_train_geo.replay.ledger import Ledger
from ray_train_geo.replay.memory_copies import copied
from ray_train_geo.replay.plan_book import PlanBook
from ray_train_geo.replay.upgrade import upgrade

__all__ = ["Ours"]

_WORTH = 0.005
"""By how much a plan must be better to take over, relative: a prediction is not exact."""

_QUESTIONS = 150
"""How often a repair may ask whether time is up: a budget that is the same on every machine.  More
changed nothing on the AWS trace, and took half as long again."""


@dataclass(frozen=True, slots=True)
class _Next:
    """The plan that takes over.

    Args:
        moving_s: what its transition takes.
        streamed_s: when its devices have their layers.
    """

    plan: Plan
    moving_s: float
    streamed_s: float

    @property
    def catch_up_s(self) -> float:
        """For what the last step changed to be sent again; at most a step, or it would not be."""
        return min(self.moving_s, self.plan.predicted_step_s)


class Ours:
    """The policy.

    Args:
        expected_s: mean time from one change of the fleet to the next.
    """

    def __init__(
        self,
        ledger: Ledger,
        book: PlanBook,
        checkpoints: Checkpoints,
        costs: OursCosts,
        expected_s: float,
    ) -> None:
        self.ledger = ledger
        self.wake_s = math.inf
        self.replans = 0
        self._book, self._checkpoints, self._costs = book, checkpoints, costs
        self._expected_s = expected_s
        self._starting: dict[str, float] = {}  # by node, when its workers can receive
        self._ready: set[str] = set()
        self._leaving: set[str] = set()
        self._plan: Plan | None = None  # whose state its devices hold
        self._gone: set[str] = set()  # devices of it that have lost their state
        self._next: _Next | None = None
        self._resume_s = math.inf  # when the next plan runs, while training is stopped
        self._stopped_s = 0.0  # when training stopped
        self._committed = 0  # steps by then
        self._considered: object = None  # what there was to think about the last time

    def change(self, change: Change) -> None:
        now_s, nodes = change.time_s, set(change.left)
        left = {d.id for d in self._book.devices(nodes)}
        self._ready -= nodes
        self._leaving = (self._leaving - nodes) | set(change.noticed)
        self._starting = {n: s for n, s in self._starting.items() if n not in nodes}
        if self._plan is None:
            self._ready |= set(change.joined)
            self._first(now_s)
        else:
            self._starting |= dict.fromkeys(change.joined, now_s + self._costs.join_s)
            self._gone |= left & {d.id for d in self._plan.devices}
            self._react(now_s, left)
        self._ask()

    def wake(self, now_s: float) -> None:
        for node in [n for n, ready_s in self._starting.items() if ready_s <= now_s]:
            del self._starting[node]
            self._ready.add(node)
        if self._next is None:
            if not self.ledger.training:
                self._recover(now_s)
        elif not self.ledger.training:
            if now_s >= self._resume_s:
                self._train(now_s, self._next.plan)
        elif now_s >= self._switch_s(self._next):
            self._stop(now_s)
            self._resume_s = now_s + self._costs.rebuild_s + self._next.catch_up_s
        self._consider(now_s)
        self._ask()

    def _first(self, now_s: float) -> None:
        """Begin as soon as any plan fits."""
        made = self._book.best(self._ready)
        if made is not None:
            self._train(now_s, made)

    def _train(self, now_s: float, plan: Plan) -> None:
        self._plan, self._next, self._resume_s = plan, None, math.inf
        self._gone = set()
        self.replans += 1
        step_s = plan.predicted_step_s * (1 + self._costs.step_overhead)
        self.ledger.train(now_s, plan.world_size, step_s)

    def _react(self, now_s: float, left: Collection[str]) -> None:
        """To devices that have left, or will."""
        assert self._plan is not None  # it has begun
        upcoming = [] if self._next is None else [d.id for d in self._next.plan.devices]
        if not self.ledger.training:
            holders = [d.id for d in self._plan.devices]
            if self._next is not None and not {*upcoming, *holders}.isdisjoint(left):
                self._recover(now_s, self._costs.detect_s)
        elif self._gone:
            self._recover(now_s, self._costs.detect_s)
        else:
            if not self._warned().isdisjoint(upcoming) or not set(left).isdisjoint(upcoming):
                self._next = None
            self._consider(now_s)

    def _warned(self) -> set[str]:
        """Devices that will leave."""
        return {d.id for d in self._book.devices(self._leaving & self._ready)}

    def _replan(self, overlapped: bool, leaving: Collection[str]) -> ReplanResult | None:
        assert self._plan is not None
        asked, there = self._book.asked, self._book.topology(self._ready)
        try:
            return replan(
                self._plan,
                there,
                asked.job,
                asked.vocab_size,
                asked.options,
                _patience(),
                expected_s=self._expected_s,
                overlapped=overlapped,
                leaving=leaving,
                lost=self._gone & {d.id for d in there.devices},
            )
        except PlanError:
            return None

    def _recover(self, now_s: float, detect_s: float = 0.0) -> None:
        """Stop, and go on with who is left; wait if they are too few."""
        self._next, self._resume_s = None, math.inf
        self._stop(now_s)
        found = self._replan(False, self._warned()) or self._replan(False, ())
        if found is None:
            self.ledger.wait(now_s)
            return
        self._roll_back(now_s, found.transition)
        moving_s = found.transition.seconds
        streamed_s = now_s + detect_s + self._costs.plan_s + moving_s
        self._next = _Next(found.plan, moving_s, streamed_s)
        self._resume_s = streamed_s + self._costs.rebuild_s

    def _stop(self, now_s: float) -> None:
        was_training = self.ledger.training
        self.ledger.stop(now_s)
        if was_training:
            self._stopped_s = now_s
            self._committed = self.ledger.committed_by(now_s)

    def _roll_back(self, now_s: float, moves: Transition) -> None:
        """Undo what no live device knows any more."""
        assert self._plan is not None
        if not moves.layers_restored:
            return
        if copied(self._plan, moves.layers_restored, self._gone):
            kept = self._committed - math.ceil(self._costs.copy_steps)
        else:
            kept = self._checkpoints.newest(self.ledger, self._plan, self._stopped_s)
        self.ledger.roll_back(self.ledger.committed_by(now_s) - max(0, kept))

    def _consider(self, now_s: float) -> None:
        """Whether another plan pays by now, or must take over because devices will leave."""
        if not self.ledger.training or self._next is not None:
            return
        assert self._plan is not None
        there, warned = self._ready - self._leaving, self._warned()
        case = self._plan.pipelines, frozenset(self._ready), frozenset(self._leaving)
        if case == self._considered:
            return
        self._considered = case
        if warned.isdisjoint(d.id for d in self._plan.devices):
            best = self._plan.predicted_step_s * (1 - _WORTH)
            scratch = self._book.best(there)
            if scratch is None or scratch.predicted_step_s >= best:
                return
            plan, moves = upgrade(self._book.asked, scratch, self._plan, self._book.topology(there))
            if self._propose(now_s, plan, moves, self._costs.better_plan_s, best):
                return
        else:
            best = math.inf
        found = self._replan(True, warned)
        if found is not None and found.plan.pipelines != self._plan.pipelines:
            self._propose(now_s, found.plan, found.transition, self._costs.plan_s, best)

    def _propose(
        self, now_s: float, plan: Plan, moves: Transition, lead_s: float, best: float
    ) -> bool:
        """Make ``plan`` the next one if its value, migration included, beats ``best``."""
        assert self._plan is not None
        moving_s = self._costs.overlap_factor * moves.seconds
        horizon = Horizon(self._expected_s, self._plan.predicted_step_s)
        if horizon.value(plan.predicted_step_s, moving_s) >= best:
            return False
        self._next = _Next(plan, moves.seconds, now_s + lead_s + moving_s)
        return True

    def _switch_s(self, upcoming: _Next) -> float:
        return self.ledger.step_end(upcoming.streamed_s)

    def _ask(self) -> None:
        due = list(self._starting.values())
        if self._next is not None:
            due.append(self._switch_s(self._next) if self.ledger.training else self._resume_s)
        self.wake_s = min(due, default=math.inf)


def _patience() -> Budget:
    questions = itertools.count(1)
    return Budget(_QUESTIONS, lambda: float(next(questions)))
