"""How many microbatches all pipelines together can do with the devices that there are.

A linear program over all possible pipelines, solved by column generation (Gilmore and Gomory,
1961): a chain that is worth more microbatches than its devices cost at the dual prices is added,
until there is none.  At any prices, the most that a chain is worth per unit of price bounds the
optimum (Farley, 1990), so that most questions are answered before the program is solved.  Of
exactly ``P`` pipelines none is worth more than its devices cost and the best of all chains gains
(the Lagrangian of the rows of devices)::

    worth <= prices @ devices + P * max over chains (worth - price)
"""

from __future__ import annotations

from collections.abc import Sequence
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
_LOSS = 10.0
"""Of a stand-in for a pipeline, in parts of the best one's worth."""
_SLACK = 1e-7
"""Relative; sums and the program's tolerances round."""
_SMALL_POOL = 256
"""Up to so many devices, whole pipelines are packed exactly by depth."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a plan may use in all; None is open.

    Args:
        pipelines: most of them.
        least_pipelines: a plan has no fewer.
    """

    pipelines: int | None = None
    least_pipelines: int = 0
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
    prices = np.concatenate([1 / classes.layer_s.sum(axis=1), np.zeros(len(rows))])
    a_pipeline = 0.0  # the price of being a pipeline; below 0, if there must be more of them
    found: list[Chain] = []
    values: list[float] = []
    columns: list[Floats] = []
    bound = np.inf
    for _ in range(_ROUNDS):
        cheapest = chains.cheapest(prices[:count] + prices[count:] @ rows)
        cost = cheapest.cost
        reachable = np.isfinite(cost) & (worth > 0)
        if not reachable.any():
            return Packing(0.0, (), ())
        bound = min(bound, _at_prices(worth[reachable], cost[reachable], prices @ most, limits))
        ratio = np.where(reachable, worth, 0.0) / np.where(cost > 0, cost, _FREE)
        gain = np.where(reachable, worth - cost - a_pipeline if columns else ratio, -np.inf)
        if target is not None and bound < target:
            break
        if columns and gain.max() <= _SLACK * worth.max():
            break
        for question in _best_of_each_cost(gain, cost):
            chain = cheapest.chain(question)
            used = np.bincount(chain.classes, minlength=count).astype(float)
            found.append(chain)
            values.append(float(worth[question]))
            columns.append(np.concatenate([used, rows @ used]))
        reached, prices, a_pipeline = _best_mix(values, columns, most, limits)
        if target is not None and reached >= target:
            break
    return Packing(bound, tuple(found), tuple(values))


def _at_prices(worth: Floats, cost: Floats, everything: float, limits: Limits) -> float:
    """No plan is worth more.

    Args:
        cost: of a chain that is worth so much, at some prices of devices.
        everything: price of all that there is.
    """
    bound = np.inf  # where chains cost nothing, they may be as many as there may be pipelines
    if cost.min() > 0:
        bound = float((worth / cost).max()) * everything
    if limits.pipelines is None:
        return bound
    gain = float((worth - cost).max())
    gains = (limits.pipelines if gain > 0 else limits.least_pipelines) * gain
    return min(bound, float(worth.max()) * limits.pipelines, everything + gains)


def _best_mix(
    values: Sequence[float], columns: Sequence[Floats], most: Floats, limits: Limits
) -> tuple[float, Floats, float]:
    """The best mix of the known chains: its worth, prices of what there is, and of a pipeline."""
    matrix, right = np.array(columns).T, most
    worth = np.array(values)
    if limits.pipelines is not None:
        # A pipeline that is not known yet may stand in for one that there must be, at a loss.
        stand_in = np.zeros((len(matrix), 1))
        fewer, more = np.ones(len(worth) + 1), -np.ones(len(worth) + 1)
        matrix = np.vstack([np.hstack([matrix, stand_in]), fewer, more])
        right = np.append(most, [limits.pipelines, -limits.least_pipelines])
        worth = np.append(worth, -_LOSS * worth.max())
    solution = linprog(-worth, A_ub=matrix, b_ub=right, bounds=(0, None), method="highs")
    prices = np.maximum(-solution.ineqlin.marginals, 0.0)
    a_pipeline = 0.0 if limits.pipelines is None else float(prices[-2] - prices[-1])
    return -float(solution.fun or 0.0), prices[: len(most)], a_pipeline


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
    highest = 0.0
    for count in range(1, pipelines + 1):
        more = np.full(devices + 1, -np.inf)
        for d, value in useful:
            more[d:] = np.maximum(more[d:], best[:-d] + value)
        best = more
        if count >= limits.least_pipelines:
            highest = max(highest, float(best[-1]))
    return highest
