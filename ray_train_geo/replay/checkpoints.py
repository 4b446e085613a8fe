"""Checkpoints: how long one takes, how often one pays, and which is the newest.

Storage is taken to be as fast as the nodes' NICs (as in `planning.transition`), and a state to be
written once and read by all pipelines.  The interval is Young's ("A first order approximation to
the optimum checkpoint interval", CACM 1974): ``sqrt(2 * save_s * mean time between failures)``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ray_train_geo.cluster.topology import Topology
from ray_train_geo.model.catalog import ModelDims
from ray_train_geo.planning.plan import PipelinePlan, Plan
from ray_train_geo.planning.transition import Holdings
from ray_train_geo.replay.ledger import Ledger

__all__ = ["Checkpoints"]


@dataclass(frozen=True, slots=True)
class Checkpoints:
    """What checkpoints cost a job.

    Args:
        topology: every device that may save or load.
        failure_every_s: mean time between the events that need a checkpoint.
        interval_s: from one to the next; None is Young's.
    """

    topology: Topology
    dims: ModelDims
    failure_every_s: float
    interval_s: float | None = None

    def load_s(self, plan: Plan) -> float:
        """Until all devices have read what they hold."""
        return self._streamed_s(plan, plan.pipelines)

    def save_s(self, plan: Plan) -> float:
        """Until the first pipeline has written everything once."""
        return self._streamed_s(plan, plan.pipelines[:1])

    def every_s(self, plan: Plan) -> float:
        """From one checkpoint to the next."""
        if self.interval_s is not None:
            return self.interval_s
        return math.sqrt(2 * self.save_s(plan) * self.failure_every_s)

    def steps_per_save(self, plan: Plan) -> int:
        """The interval in whole steps, at least one."""
        return max(1, round(self.every_s(plan) / plan.predicted_step_s))

    def newest(self, ledger: Ledger, plan: Plan, now_s: float) -> int:
        """Steps in the newest complete checkpoint of a job that saves in the background."""
        every_s = max(self.every_s(plan), self.save_s(plan), plan.predicted_step_s)
        return ledger.committed_by(math.floor((now_s - self.save_s(plan)) / every_s) * every_s)

    def _streamed_s(self, plan: Plan, pipelines: tuple[PipelinePlan, ...]) -> float:
        there = self.topology.with_devices(plan.devices)
        stages = {s.device: s.layers for p in pipelines for s in p.stages}
        return Holdings({}, there, self.dims).moves_to(stages).seconds
