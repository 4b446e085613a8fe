"""What goodput is measured against: the same devices, undisturbed."""

from __future__ import annotations

from collections.abc import Iterable

from ray_train_geo.replay.fleet import Fleet
from ray_train_geo.replay.ledger import Ledger
from ray_train_geo.replay.plan_book import PlanBook

__all__ = ["reference_steps"]


def reference_steps(fleet: Fleet, book: PlanBook, ledgers: Iterable[Ledger]) -> float:
    """Steps of a job that always runs the best plan for who is there, and changes it for free.

    Of the plans that anybody knows: the planner's from scratch, and those that any policy ran at
    that time on these devices.  So nobody can beat it.
    """
    spans = [s for ledger in ledgers for s in ledger.spans if s.kind == "training"]
    total = 0.0
    for start_s, end_s, nodes in fleet.phases:
        best = book.best(nodes)
        steps_per_s = 0.0 if best is None else 1 / best.predicted_step_s
        ran = (1 / s.step_s for s in spans if s.start_s < end_s and s.end_s > start_s)
        total += max(steps_per_s, *ran, 0.0) * (end_s - start_s)
    return total
