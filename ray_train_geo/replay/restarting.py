"""Checkpoint and restart: training stops, and starts again from the newest checkpoint.

::

    step step step save step st| detect, start processes | load | step step step save
                            ^ a device that trains is gone: lost since the checkpoint

``checkpoint-restart`` is a careful operator: the interval is the optimum, and when new devices make
a faster plan possible that pays, training restarts right behind a checkpoint.  ``restart`` is a
plain elastic launcher: every node that joins restarts the job as well, at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from ray_train_geo.planning.plan import Plan
from ray_train_geo.replay.assumptions import CheckpointRestartCosts, RestartCosts
from ray_train_geo.replay.checkpoints import Checkpoints
from ray_train_geo.replay.fixed_shape import FixedShape
from ray_train_geo.replay.fleet import Change
from ray_train_geo.replay.ledger import Ledger

__all__ = ["Outage", "Restarting", "careful_outage", "plain_outage"]


@dataclass(frozen=True, slots=True)
class Outage:
    """Why training stops.

    Args:
        lost: a device that trained is gone; otherwise the stop is meant.
        shrinks: there will be fewer pipelines than before.
    """

    lost: bool
    shrinks: bool


def careful_outage(costs: CheckpointRestartCosts) -> Callable[[Outage], float]:
    """Seconds until the checkpoint can be read: a stop that is meant needs no detection."""
    return lambda outage: costs.restart_s + (costs.detect_s if outage.lost else 0.0)


def plain_outage(costs: RestartCosts) -> Callable[[Outage], float]:
    """Seconds until the checkpoint can be read."""
    return lambda outage: costs.shrunk_s if outage.shrinks else costs.replaced_s


class Restarting:
    """The policy.

    Args:
        outage_s: of an outage, without reading the checkpoint.
        at_joins: restart whenever a node joins, and at once.
    """

    def __init__(
        self,
        ledger: Ledger,
        shape: FixedShape,
        checkpoints: Checkpoints,
        outage_s: Callable[[Outage], float],
        at_joins: bool,
    ) -> None:
        self.ledger = ledger
        self.wake_s = math.inf
        self.replans = 0
        self._shape, self._checkpoints = shape, checkpoints
        self._outage_s, self._at_joins = outage_s, at_joins
        self._there: set[str] = set()
        self._plan: Plan | None = None
        self._loading = False
        self._started = False

    def change(self, change: Change) -> None:
        now_s = change.time_s
        self._there = (self._there - set(change.left)) | set(change.joined)
        used = {d.node for d in self._plan.devices} if self._plan is not None else set()
        if self._plan is None:
            if change.joined:
                self._stop(now_s, lost=False)
        elif used & set(change.left):
            self._stop(now_s, lost=True)
        elif self._at_joins and change.joined:
            self._stop(now_s, lost=False)
        elif self.ledger.training:
            self.wake_s = self._growth_s(now_s)

    def wake(self, now_s: float) -> None:
        if self.ledger.training:
            self._stop(now_s, lost=False)
        elif self._loading:
            self._train(now_s)
        else:
            self._load(now_s)

    def _growth_s(self, now_s: float) -> float:
        """When to restart for a faster plan: at the next checkpoint, or never.

        It must pay before the next failure is due.
        """
        assert self._plan is not None  # it trains
        found = self._shape.plan(self._there)
        if found is None:
            return math.inf
        gain = self._plan.predicted_step_s / found.predicted_step_s - 1
        stop_s = self._outage_s(Outage(lost=False, shrinks=False)) + self._checkpoints.load_s(found)
        if gain * self._checkpoints.failure_every_s <= stop_s:
            return math.inf
        return self.ledger.save_end(now_s)

    def _stop(self, now_s: float, lost: bool) -> None:
        """Whatever runs ends; what comes next is planned when the processes have started."""
        before = 0 if self._plan is None else len(self._plan.pipelines)
        found = self._shape.plan(self._there)
        self._loading = False
        self.ledger.stop(now_s, to_checkpoint=True)
        if found is None:
            self.ledger.wait(now_s)
            self._plan, self.wake_s = None, math.inf
        elif not self._started:
            self._plan, self._started = found, True
            self._train(now_s)
        else:
            self._plan = found
            outage = Outage(lost, shrinks=len(found.pipelines) < before)
            self.wake_s = now_s + self._outage_s(outage)

    def _load(self, now_s: float) -> None:
        assert self._plan is not None  # else it would wait
        # Others may have joined in the meantime; none that it counted on has left.
        plan = self._shape.plan(self._there) or self._plan
        self._plan, self._loading = plan, True
        self.wake_s = now_s + self._checkpoints.load_s(plan)

    def _train(self, now_s: float) -> None:
        assert self._plan is not None
        plan, saves = self._plan, self._checkpoints
        self.replans += 1
        self._loading = False
        self.ledger.train(
            now_s,
            plan.world_size,
            plan.predicted_step_s,
            saves.steps_per_save(plan),
            saves.save_s(plan),
        )
        self.wake_s = self._growth_s(now_s)
