"""Bounds on plans of every gradient-sync mode that a job allows, by those that `certify` knows.

`certify` knows what a ring, a central server and a sharded server with equal shards take at least.
What it says of them holds for the other modes too, if only part of the gradients' bytes count:

``tree``           Over some link that joins any two parts of a group all gradients go up, and come
                   down afterwards, and whatever has some of the members and not all sends and gets
                   all of them: no less than with a **central server**.

shards by speed    The member with the largest shard makes an ``n``-th or more of the sums.  From
                   every other it gets, and sends it, as much as with **equal shards**, so that no
                   two parts of a group are cheaper.  A node with ``k`` members sends ``k (1 - W) +
                   (n - k) W``, with any ``W`` at least half of the ``2 k (n - k) / n`` of equal
                   shards; a region likewise.

``hierarchical``   No message is smaller than an ``n``-th, and each goes both ways in both halves:
                   links are no cheaper than with **equal shards**.  But whatever has some of the
                   members sends all gradients once, where equal shards send them up to ``2 k``
                   times from a node with ``k`` members, and up to twice from any other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from ray_train_geo.planning.certify import Bound
from ray_train_geo.planning.problem import Problem
from ray_train_geo.spec import GradientSyncName

__all__ = ["least_bound", "stand_ins"]

_UNEQUAL_SHARDS = 0.5


def stand_ins(problem: Problem) -> dict[float, list[GradientSyncName]]:
    """Part of the gradients' bytes that counts -> modes of `certify` that stand for the allowed."""
    most_on_node = int(np.bincount(problem.table.node).max())
    least: dict[GradientSyncName, float] = {}
    for mode in (*problem.modes, *problem.late_modes):
        part, known = 1.0, mode
        if mode == "tree":
            known = "central_ps"
        elif mode == "hierarchical":
            part, known = 1 / (2 * most_on_node), "sharded_ps"
        elif mode == "sharded_ps" and problem.shards_by_speed:
            part = _UNEQUAL_SHARDS
        least[known] = min(part, least.get(known, 1.0))
    found: dict[float, list[GradientSyncName]] = {}
    for known, part in least.items():
        found.setdefault(part, []).append(known)
    return found


def least_bound(
    problem: Problem, bound: Callable[[Problem, Sequence[GradientSyncName]], Bound]
) -> Bound:
    """The least of ``bound`` over all modes that the job allows.

    Args:
        bound: of a problem and some of the modes that `certify` knows.
    """
    found = [
        bound(problem if part == 1 else replace(problem, gradient_part=part), modes)
        for part, modes in stand_ins(problem).items()
    ]
    return min(found, key=lambda one: one.value)
