"""How many microbatches all pipelines together can do with the devices that there are.

A linear program over all possible pipelines, solved by column generation (Gilmore and Gomory,
1961): a chain that is worth more microbatches than its devices cost at the dual prices is added,
until there is none.  At any prices, the most that a chain is worth per unit of price bounds the
optimum (Farley, 1990), so that most questions are answered before the program is solved.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import linprog

from ray_train_geo.planning.certify_chains import Chain, Chains, DeviceClasses
from ray_train_geo.planning.link_table import Floats

__all__ = ["Limits", "Packing", "can_reach", "pack"]

_FREE = 1e-150
"""The price of what costs nothing, so that a ratio to it is large and still a number."""
_ROUNDS = 60
_NEW_CHAINS = 6
_SLACK = 1e-7
"""Relative; sums and the program's tolerances round."""
_SMALL_POOL = 256
"""Up to so many devices, whole pipelines are packed exactly by depth."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a plan may use in all; None is open."""

    pipelines: int | None = None
    devices: int | None = None
    dollars_per_hour: float | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Packing:
    """The linear program's answer.

    Args:
        bound: no plan is worth more.
        chains, worth: columns that were looked at, and what one of each is worth.
    """

    bound: float
    chains: tuple[Chain, ...]
    worth: tuple[float, ...]


def can_reach(
    target: float, worth: Floats, chains: Chains, classes: DeviceClasses, limits: Limits
) -> bool:
    """Whether pipelines worth ``target`` in all may exist; False is a proof that they don't.

    Args:
        worth: ``[n]``; of a chain that answers question ``i`` of ``chains``.
    """
    target *= 1 - _SLACK
    total = int(classes.count.sum())
    if limits.devices is not None:
        total = min(total, limits.devices)
    if total <= _SMALL_POOL and _whole_pipelines(worth, chains, total, limits) < target:
        return False
    return pack(worth, chains, classes, limits, target).bound >= target


def pack(
    worth: Floats,
    chains: Chains,
    classes: DeviceClasses,
    limits: Limits,
    target: float | None = None,
) -> Packing:
    """Solve the linear program; with a ``target``, only until it is reached or out of reach."""
    count = len(classes.count)
    named = [
        (np.ones(count), limits.devices),
        (classes.price_per_hour, limits.dollars_per_hour),
    ]
    rows = np.array([row for row, limit in named if limit is not None]).reshape(-1, count)
    most = np.array([*classes.count, *(x for _, x in named if x is not None)], dtype=float)
    if limits.pipelines is not None:
        most = np.append(most, limits.pipelines)
    prices = np.zeros(len(most))
    prices[:count] = 1 / classes.layer_s.sum(axis=1)
    found: list[Chain] = []
    values: list[float] = []
    columns: list[Floats] = []
    bound = np.inf
    for _ in range(_ROUNDS):
        per_class = prices[:count] + prices[count : count + len(rows)] @ rows
        cheapest = chains.cheapest(per_class)
        cost = cheapest.cost
        if limits.pipelines is not None:
            cost = cost + prices[-1]
        reachable = np.isfinite(cost) & (worth > 0)
        if not reachable.any():
            return Packing(0.0, (), ())
        ratio = np.where(reachable, worth, 0.0) / np.where(cost > 0, cost, _FREE)
        bound = min(bound, float(ratio.max() * (prices @ most)))
        if limits.pipelines is not None:
            bound = min(bound, float(worth[reachable].max()) * limits.pipelines)
        gain = np.where(reachable, worth - cost if columns else ratio, -np.inf)
        if target is not None and bound < target:
            break
        if columns and gain.max() <= _SLACK * worth.max():
            break
        for question in _best_of_each_cost(gain, cost):
            chain = cheapest.chain(question)
            used = np.bincount(chain.classes, minlength=count).astype(float)
            column = np.concatenate([used, rows @ used])
            if limits.pipelines is not None:
                column = np.append(column, 1.0)
            found.append(chain)
            values.append(float(worth[question]))
            columns.append(column)
        solution = linprog(
            -np.array(values), A_ub=np.array(columns).T, b_ub=most, bounds=(0, None), method="highs"
        )
        reached = -float(solution.fun or 0.0)
        if target is not None and reached >= target:
            break
        prices = np.maximum(-solution.ineqlin.marginals, 0.0)
    return Packing(bound, tuple(found), tuple(values))


def _best_of_each_cost(gain: Floats, cost: Floats) -> list[int]:
    """Questions of the highest gains, one of each cost (chains that cost the same are alike)."""
    chosen: dict[float, int] = {}
    for i in np.argsort(-gain, kind="stable"):
        if not np.isfinite(gain[i]) or len(chosen) == _NEW_CHAINS:
            break
        chosen.setdefault(float(f"{cost[i]:.9g}"), int(i))
    return list(chosen.values())


def _whole_pipelines(worth: Floats, chains: Chains, devices: int, limits: Limits) -> float:
    """Most that whole pipelines are worth, if devices were all of the kind that suits each best.

    A knapsack: a pipeline of a given depth is worth what the best of that depth is.
    """
    depth = chains.cheapest(np.ones(chains.first.shape[1])).cost
    best = np.zeros(devices + 1)
    by_depth = [
        (d, float(worth[depth == d].max(initial=0.0)))
        for d in range(1, min(devices, chains.layers) + 1)
    ]
    useful = [(d, value) for d, value in by_depth if value > 0]
    if not useful:
        return 0.0
    pipelines = devices // useful[0][0]
    if limits.pipelines is not None:
        pipelines = min(pipelines, limits.pipelines)
    for _ in range(pipelines):
        more = best.copy()
        for d, value in useful:
            more[d:] = np.maximum(more[d:], best[:-d] + value)
        best = more
    return float(best[-1])
