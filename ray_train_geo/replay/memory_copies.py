"""In-memory copies: who keeps another device's state, for when all its holders are gone.

Every device's state is copied, step by step and in the background, to the next device of the plan
in another region, or if there is none on another node::

    a: 0-2   b: 2-4   c: 4-6        on one node each
    a's copy is on b, b's on c, c's on a
"""

from __future__ import annotations

from collections.abc import Collection

from ray_train_geo.cluster.topology import Device
from ray_train_geo.planning.plan import Plan

__all__ = ["copied", "keeper"]


def keeper(plan: Plan, rank: int) -> Device | None:
    """Who keeps the copy of the state of ``plan.devices[rank]``; None where there is one node."""
    devices = plan.devices
    own = devices[rank]
    others = [*devices[rank + 1 :], *devices[:rank]]
    far = (d for d in others if d.region != own.region)
    near = (d for d in others if d.node != own.node)
    return next(far, None) or next(near, None)


def copied(plan: Plan, layers: Collection[int], gone: Collection[str]) -> bool:
    """Whether a copy of each of ``layers`` outlives the devices that are gone."""
    runs = [stage.layers for p in plan.pipelines for stage in p.stages]
    kept: set[int] = set()
    for rank, run in enumerate(runs):
        holder = keeper(plan, rank)
        if holder is not None and holder.id not in gone:
            kept.update(range(*run))
    return kept.issuperset(layers)
