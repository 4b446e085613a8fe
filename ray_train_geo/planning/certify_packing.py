"""How many microbatches all pipelines together can do with the devices that there are.

A linear program over all possible pipelines, solved by column generation (Gilmore and Gomory,
1961): a chain that is worth more microbatches than its devices cost at the dual prices is added,
until there is none.  At any prices, what they make of the limits plus what the best chain gains
for each pipeline bounds the optimum (Farley, 1990, where the number of pipelines is open), so that
most questions are answered before the program is solved.

Nodes of several devices are bought as a whole, for one of the uses that they may be put to; a use
has its devices, and limits of its own on what their stages ask of the NIC (`certify_nics`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import linprog

from ray_train_geo.planning.certify_chains import Chain, Chains
from ray_train_geo.planning.certify_classes import DeviceClasses
from ray_train_geo.planning.certify_nics import NicPrices
from ray_train_geo.planning.link_table import Floats, Ints

__all__ = ["Limits", "Packing", "can_reach", "pack"]

_ROUNDS = 60
_NEW_CHAINS = 6
_SLACK = 1e-7
"""Relative; sums and the program's tolerances round."""
_MANY = 1_000_000
_PENALTY = 2.0
"""In parts of the best pipeline, for each that is missing."""
_SMALL_POOL = 256
"""Up to so many devices, whole pipelines are packed exactly by depth."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a plan may use in all; None is open.

    Args:
        pipelines: fewest and most.
    """

    pipelines: tuple[int, int] | None = None
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
    total = int(classes.count[classes.serves[:, 0] == 1].sum())
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
    program = _Program(chains, classes, limits)
    duals = program.first_prices()
    found: list[Chain] = []
    values: list[float] = []
    columns: list[Floats] = []
    bound = np.inf
    for _ in range(_ROUNDS):
        prices = program.prices(duals)
        cheapest = chains.cheapest(*prices)
        cost = cheapest.cost
        cost = cost + duals[program.pipelines] - duals[program.pipelines + 1]
        reachable = np.isfinite(cost) & (worth > 0)
        if not reachable.any():
            return Packing(0.0, (), ())
        gain = np.where(reachable, worth - cost, -np.inf)
        bound = min(
            bound, _bound(worth[reachable], cost[reachable], float(program.most @ duals), limits)
        )
        if target is not None and bound < target:
            break
        if columns and gain.max() <= _SLACK * worth.max():
            break
        if not columns:  # the first prices have no scale
            gain = np.where(reachable, worth / np.where(cost > 0, cost, 1e-300), -np.inf)
        for question in _best_of_each_cost(gain, cost):
            chain = cheapest.chain(question)
            found.append(chain)
            values.append(float(worth[question]))
            columns.append(program.column(chain, question, prices[1]))
        reached, duals = program.solve(np.array(values), np.array(columns).T)
        if target is not None and reached >= target:
            break
    return Packing(bound, tuple(found), tuple(values))


def _bound(worth: Floats, cost: Floats, limits_worth: float, limits: Limits) -> float:
    """No packing is worth more, at these prices."""
    found = np.inf
    if (cost > 0).all():
        found = float((worth / cost).max()) * limits_worth
    if limits.pipelines is not None:
        most = limits.pipelines[1]
        gain = most * max(0.0, float((worth - cost).max()))
        found = min(found, limits_worth + gain, float(worth.max()) * most)
    return found


class _Program:
    """The rows of the linear program, and the columns of nodes.

    Rows: devices of each class, limits on the plan, most and fewest pipelines, then for each use of nodes with
    several devices its tangents, messages, and pipelines served, uplinks, and nodes of each pool.

    Attributes:
        most: ``[rows]``; right-hand sides.
        pipelines: row of the most pipelines; that of the fewest is the next.
    """

    def __init__(self, chains: Chains, classes: DeviceClasses, limits: Limits) -> None:
        self.chains, self.classes, self.limits = chains, classes, limits
        count = len(classes.count)
        self.count = count
        named = [
            (np.ones(count), limits.devices),
            (classes.price_per_hour, limits.dollars_per_hour),
        ]
        self.limited = np.array([row for row, limit in named if limit is not None])
        self.limited = self.limited.reshape(-1, count)
        self.pipelines = count + len(self.limited)
        uses = np.stack([classes.pool, classes.serves[:, 0]], axis=1)
        _, self.use = np.unique(uses, axis=0, return_inverse=True)
        self.use = self.use.reshape(-1)
        self.shared: list[int] = []
        if chains.nics is not None:
            self.shared = sorted(set(self.use[chains.nics.classes].tolist()))
        self.tangents = 0 if chains.nics is None else len(chains.nics.tangents)
        self.nic_rows = self.pipelines + 2
        self.per_use = self.tangents + 2
        pools = np.unique(classes.pool)
        self.uplink_rows = self.nic_rows + self.per_use * len(self.shared)
        uplinks = 0 if chains.ways is None else chains.ways.uplink_s.shape[1]
        self.pool_rows = self.uplink_rows + uplinks
        self.most = np.zeros(self.pool_rows + len(pools))
        self.most[count : self.pipelines] = [x for _, x in named if x is not None]
        fewest, most = limits.pipelines or (0, _MANY)
        self.most[self.pipelines : self.nic_rows] = most, -fewest
        if chains.ways is not None:
            self.most[self.uplink_rows : self.pool_rows] = chains.ways.left_s
        self.most[self.pool_rows :] = [
            classes.count[c] / classes.on_node[c]
            for c in (int(np.flatnonzero(classes.pool == pool)[0]) for pool in pools)
        ]
        self.nodes = np.stack(
            [self._node(int(u), pools) for u in range(int(self.use.max()) + 1)], axis=1
        )

    def _node(self, use: int, pools: Ints) -> Floats:
        """The column of a node that is put to a use: what it gives is negative."""
        column = np.zeros(len(self.most))
        members = np.flatnonzero(self.use == use)
        column[members] = -self.classes.on_node[members]
        column[self.pool_rows + int(np.searchsorted(pools, self.classes.pool[members[0]]))] = 1.0
        nics = self.chains.nics
        if nics is not None and use in self.shared:
            i = int(np.searchsorted(nics.classes, members[0]))
            row = self._nic_row(use)
            column[row : row + self.tangents] = -(nics.tangents[:, i] ** 2) / 2
            column[row + self.tangents] = -nics.left_s.max()
            column[row + self.tangents + 1] = self.classes.serves[members[0], 0]
        return column

    def _nic_row(self, use: int) -> int:
        return self.nic_rows + self.per_use * self.shared.index(use)

    def first_prices(self) -> Floats:
        """Devices at their speed, and nodes at their devices'."""
        duals = np.zeros(len(self.most))
        duals[: self.count] = 1 / self.classes.layer_s.sum(axis=1)
        worth = -duals @ self.nodes
        for pool in range(self.pool_rows, len(duals)):
            duals[pool] = worth[self.nodes[pool] > 0].max()
        return duals

    def prices(self, duals: Floats) -> tuple[Floats, NicPrices | None, Floats]:
        """Of devices by class, of NICs, and of uplinks."""
        uplinks = duals[self.uplink_rows : self.pool_rows]
        limited = duals[self.count : self.pipelines] @ self.limited
        devices: Floats = duals[: self.count] + limited
        nics = self.chains.nics
        if nics is None:
            return devices, None, uplinks
        early, load, hop, touch = np.zeros((4, self.count))
        for i, c in enumerate(nics.classes.tolist()):
            row = self._nic_row(int(self.use[c]))
            tangents = duals[row : row + self.tangents]
            early[c], load[c] = tangents.sum(), tangents @ nics.tangents[:, i]
            hop[c], touch[c] = duals[row + self.tangents], duals[row + self.tangents + 1]
        return devices, NicPrices(early, load, hop, touch), uplinks

    def column(self, chain: Chain, question: int, prices: NicPrices | None) -> Floats:
        """What a chain needs."""
        column = np.zeros(len(self.most))
        used = np.bincount(chain.classes, minlength=self.count)
        column[: self.count] = used
        column[self.count : self.pipelines] = self.limited @ used
        column[self.pipelines : self.nic_rows] = 1.0, -1.0
        nics, ways = self.chains.nics, self.chains.ways
        if ways is not None:
            column[self.uplink_rows : self.pool_rows] = ways.asked(chain.classes, question)
        if nics is None or prices is None:
            return column
        stages = list(zip(chain.classes, chain.layers, strict=True))
        early, load, hop, touch = nics.asked(stages, question, prices)
        for i, c in enumerate(nics.classes.tolist()):
            row = self._nic_row(int(self.use[c]))
            column[row : row + self.tangents] += early[c] + nics.tangents[:, i] * load[c]
            column[row + self.tangents] += hop[c]
            column[row + self.tangents + 1] -= touch[c]
        return column

    def solve(self, worth: Floats, columns: Floats) -> tuple[float, Floats]:
        """The optimum with these columns, and its dual prices."""
        missing = np.zeros((len(self.most), 1))  # a pipeline for which there is no column yet
        missing[self.pipelines + 1] = -1.0
        objective = np.concatenate([-worth, [_PENALTY * worth.max()], np.zeros(len(self.nodes.T))])
        solution = linprog(
            objective,
            A_ub=np.hstack([columns, missing, self.nodes]),
            b_ub=self.most,
            bounds=(0, None),
            method="highs",
        )
        duals: Floats = np.maximum(-solution.ineqlin.marginals, 0.0)
        return -float(solution.fun or 0.0), duals


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
        pipelines = min(pipelines, limits.pipelines[1])
    for _ in range(pipelines):
        more = best.copy()
        for d, value in useful:
            more[d:] = np.maximum(more[d:], best[:-d] + value)
        best = more
    return float(best[-1])
