r"""A bound on DT-FM's cost that counts runs of groups, and a model of paths over group types.

Take only links within a *level* t.  They join classes to components, and a hop within t keeps how
many of a group's devices each component has: its *profile*.  So at each level the path falls into
runs of one profile, a run is as long as the components' sizes allow, and between two runs is a hop
slower than t.  Over the levels :math:`t_0 < t_1 < ...`, as in Kruskal's algorithm::

    path >= (stages - 1) t_0 + sum_x (t_{x+1} - t_x) (runs at level x - 1)

    level 0   | ab ab | cc cc | dd | ee |      3 hops are slower than t_0
    level 1   | ab ab | cc cc   dd | ee |      2 of these are slower than t_1

Types are few where the limit on data parallelism is strict.  The integer program over how many
groups have each type is small and its bound close.  Where a level joins no nodes of a site, its
runs are packed into nodes (``dtfm_runs``).  Where that is not enough, the order of the types joins
in: a circuit over those in use, each visited once, at the distances that detours leave.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from ortools.sat.python import cp_model
from scipy.sparse.csgraph import connected_components

from ray_train_geo.planning.dtfm_classes import ClassProblem, Group
from ray_train_geo.planning.dtfm_runs import Demand, SplitRuns
from ray_train_geo.planning.dtfm_sites import Site
from ray_train_geo.planning.dtfm_solver import Result, run
from ray_train_geo.planning.dtfm_types import Types, excess_between

__all__ = ["LevelModel"]

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Profile = tuple[tuple[tuple[int, int], ...], tuple[tuple[int, int], ...]]

_SCALE = 2.0**40  # units of the least known cost
_BETTER = 2.0**-32
"""Placements count that cost less than the known one by more than this part of it.  That is far
more than what rounding down to units can hide."""


class LevelModel:
    """Placements over ``types`` that cost less than ``cost_s``.

    Args:
        types: at least one.
        low_s: what data parallelism counts at least.
    """

    def __init__(
        self,
        problem: ClassProblem,
        sites: Sequence[Site],
        types: Types,
        low_s: float,
        cost_s: float,
    ) -> None:
        self._problem, self._sites, self._types = problem, sites, types
        self._scale = _SCALE / cost_s
        self._limit = math.floor(_SCALE * (1 - _BETTER))
        self._least_path_s = (problem.stages - 1) * problem.least_hop_s()
        self._slack_s = cost_s - low_s - self._least_path_s
        self._model = cp_model.CpModel()
        self._split: SplitRuns | None = None
        self._split_hops: cp_model.LinearExprT = 0
        self._joined_s = problem.least_hop_s()
        room = np.array([site.devices for site in sites])
        used = types.counts
        repeats = np.where(used > 0, room // np.maximum(used, 1), problem.stages).min(axis=1)
        self._most = np.minimum(repeats, problem.stages).tolist()
        self._number = [self._model.new_int_var(0, most, "number") for most in self._most]
        self._model.add(sum(self._number) == problem.stages)
        for devices, column in zip(room.tolist(), used.T.tolist(), strict=True):
            numbers = zip(column, self._number, strict=True)
            self._model.add(sum(taken * number for taken, number in numbers) <= devices)
        top = max(self._units(self._slack_s), 0) + 1
        self._excess = self._model.new_int_var(0, top, "excess")
        self._model.add(self._excess >= self._slow_hops())
        self._objective = self._data_parallel(low_s) + self._excess
        self._objective += self._units(self._least_path_s)
        self._model.add(self._objective <= self._limit)
        self._model.minimize(self._objective)

    def solve(
        self, effort: float, deadline: Callable[[], bool] | None, prove: bool = False
    ) -> Result:
        """The bound; and the groups of the placement that reaches it, in no good order.

        Args:
            prove: look for the bound alone, which is faster where the model is large.
        """
        solver, status = run(self._model, effort, deadline, linearization=2, prove=prove)
        spent = solver.response_proto.deterministic_time
        beyond_s = self._limit / self._scale
        if status == "INFEASIBLE":
            return Result(beyond_s, None, True, spent)
        bound_s = min(solver.best_objective_bound / self._scale, beyond_s)
        groups = self._groups(solver) if status in ("OPTIMAL", "FEASIBLE") else None
        return Result(bound_s, groups, status == "OPTIMAL", spent)

    def _groups(self, solver: cp_model.CpSolver) -> tuple[Group, ...] | None:
        if self._split is not None:
            return self._split.groups(solver)
        if any(len(site.classes) > 1 for site in self._sites):
            return None
        return tuple(
            self._rest(counts)
            for counts, number in zip(self._types.counts, self._number, strict=True)
            for _ in range(solver.value(number))
        )

    def _rest(self, counts: Ints) -> Group:
        """The devices of a type that are of sites with one class."""
        return tuple(
            site.classes[0]
            for site, count in zip(self._sites, counts.tolist(), strict=True)
            for _ in range(count)
            if len(site.classes) == 1
        )

    def add_order(self) -> None:
        """Let the hops cost at least what a path over the types in use does.

        A hop's excess is split: each end pays the half of the least excess that its type ever has.
        The rest is a distance between types; by way of others it may be shorter, so that skipping
        a type that was visited before never makes a path longer.  Levels that join no nodes of
        some sites are left to the runs, so of a hop only what is above them counts.
        """
        label = np.zeros(len(self._problem.sizes), dtype=np.int64)
        for s, site in enumerate(self._sites):
            label[list(site.classes)] = s
        merged = self._problem.merged(label.tolist())
        between_s = excess_between(merged, self._types.counts, self._slack_s)
        below_s = self._joined_s - merged.least_hop_s()
        between_s = np.maximum(between_s - max(below_s, 0.0), 0.0)
        least_s = between_s.min(axis=1)
        half_s = np.where(np.isfinite(least_s), least_s / 2, 0.0)
        distance_s = np.maximum(between_s - half_s[:, None] - half_s[None, :], 0.0)
        np.fill_diagonal(distance_s, 0.0)
        for via in range(len(distance_s)):
            distance_s = np.minimum(distance_s, distance_s[:, [via]] + distance_s[[via], :])
        model, count = self._model, len(distance_s)
        arcs: list[tuple[int, int, cp_model.LiteralT]] = []
        cost: cp_model.LinearExprT = 0
        for i in range(count):
            visited, first, last = (model.new_bool_var(name) for name in ("visit", "first", "last"))
            model.add(self._number[i] >= visited)
            model.add(self._number[i] <= self._most[i] * visited)
            arcs += [(i, i, ~visited), (count, i, first), (i, count, last)]
            cost += self._units(2 * half_s[i]) * self._number[i]
            cost -= (self._units(half_s[i]) + 1) * (first + last)
            for j in np.flatnonzero(distance_s[i] <= self._slack_s):
                if i != j:
                    step = model.new_bool_var("step")
                    arcs.append((i, int(j), step))
                    cost += self._units(float(distance_s[i, j])) * step
        model.add_circuit(arcs)
        model.add(self._excess >= self._split_hops + cost)

    def _units(self, seconds: float) -> int:
        return math.floor(seconds * self._scale)

    def _data_parallel(self, low_s: float) -> cp_model.LinearExprT:
        """The slowest type's: one step up for each value that a type in use has."""
        steps: dict[int, list[int]] = defaultdict(list)
        for i, sync_s in enumerate(self._types.least_s):
            if sync_s > low_s:
                steps[self._units(float(sync_s))].append(i)
        slowest = last = self._units(low_s)
        total: cp_model.LinearExprT = slowest
        reached: cp_model.IntVar | None = None
        for units in sorted(steps):
            reaches = self._model.new_bool_var("reaches")
            if reached is not None:
                self._model.add_implication(reaches, reached)
            numbers = sum(self._number[i] for i in steps[units])
            self._model.add(numbers <= self._problem.stages * reaches)
            total += (units - last) * reaches
            last, reached = units, reaches
        return total

    def _slow_hops(self) -> cp_model.LinearExprT:
        """What hops cost above the fastest link, by level."""
        total: cp_model.LinearExprT = 0
        for low_s, high_s, labels, alone in _levels(self._problem):
            split = [len(set(labels[list(site.classes)].tolist())) > 1 for site in self._sites]
            total += self._units(high_s - low_s) * (self._runs(labels, alone, split) - 1)
            if any(split):
                self._split_hops, self._joined_s = total, high_s
        return total

    def _runs(
        self, labels: Ints, alone: NDArray[np.bool_], split: Sequence[bool]
    ) -> cp_model.LinearExprT:
        """How many runs there are at least at a level."""
        component = [int(labels[site.classes[0]]) for site in self._sites]
        dead = [bool(alone[site.classes[0]]) for site in self._sites]
        sizes = np.bincount(labels, weights=self._problem.sizes).astype(int).tolist()
        members: dict[Profile, list[int]] = defaultdict(list)
        longest: dict[Profile, int] = {}
        for i, counts in enumerate(self._types.counts.tolist()):
            inside: dict[int, int] = defaultdict(int)
            for s, count in enumerate(counts):
                if count and not split[s]:
                    inside[component[s]] += count
            cut = tuple((s, n) for s, n in enumerate(counts) if n and split[s])
            profile = tuple(sorted(inside.items())), cut
            members[profile].append(i)
            limits = [sizes[x] // n for x, n in inside.items()]
            touched = any(n and dead[s] and not split[s] for s, n in enumerate(counts))
            longest[profile] = 1 if touched else min([self._problem.stages, *limits])
        runs: cp_model.LinearExprT = 0
        if any(split):
            packed = SplitRuns(
                self._model,
                self._sites,
                self._types.spreads,
                (~alone).tolist(),
                self._problem.stages,
            )
            for profile, inside_it in members.items():
                groups = sum(self._number[i] for i in inside_it)
                demands = [self._demand(s, n, inside_it) for s, n in profile[1]]
                rest = self._rest(self._types.counts[inside_it[0]])
                runs += packed.add_profile(groups, demands, rest, longest[profile])
            packed.pack()
            if len(set(labels.tolist())) == len(labels):
                self._split = packed
            return runs
        for profile, inside_it in members.items():
            numbers = sum(self._number[i] for i in inside_it)
            if longest[profile] <= 1:
                runs += numbers
                continue
            number = self._model.new_int_var(0, self._problem.stages, "runs")
            self._model.add(numbers <= longest[profile] * number)
            runs += number
        return runs

    def _demand(self, site: int, count: int, types: Sequence[int]) -> Demand:
        """The spreads that the limit on data parallelism leaves to one of the types at least."""
        left_s = self._types.high_s - self._types.elsewhere_s[list(types), site].min()
        spreads = self._types.spreads[site, count]
        return site, count, sum(spread.exchange_s <= left_s for spread in spreads)


def _levels(problem: ClassProblem) -> Iterator[tuple[float, float, Ints, NDArray[np.bool_]]]:
    """Each level and the next, each class's component, and which classes have no partners."""
    usable = problem.usable
    hops_s = np.unique(problem.hop_s[usable])
    for low_s, high_s in pairwise(hops_s.tolist()):
        within = usable & (problem.hop_s <= low_s)
        _, labels = connected_components(within, directed=False)
        yield low_s, high_s, labels.astype(np.int64), ~within.any(axis=1)
