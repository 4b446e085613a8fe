"""On-demand devices: nobody takes them back, and they cost more."""

from __future__ import annotations

import math

from ray_train_geo.replay.fleet import Change
from ray_train_geo.replay.ledger import Ledger
from ray_train_geo.replay.plan_book import PlanBook

__all__ = ["OnDemand"]


class OnDemand:
    """The policy: one plan from beginning to end, on a fleet that stays."""

    def __init__(self, ledger: Ledger, book: PlanBook) -> None:
        self.ledger = ledger
        self.wake_s = math.inf
        self.replans = 0
        self._book = book

    def change(self, change: Change) -> None:
        plan = self._book.best(change.joined)
        if plan is not None:
            self.replans += 1
            self.ledger.train(change.time_s, plan.world_size, plan.predicted_step_s)

    def wake(self, now_s: float) -> None:
        """Never asked for."""
