r"""A bound on DT-FM's cost that counts runs of groups, and a model of paths over group types.

Take only links within a *level* t.  They join classes to components, and a hop within t keeps how
many of a group's devices each component has: its *profile*.  So at each level the path falls into
runs of one profile, a run is as long as the components' sizes allow, and between two runs is a hop
slower than t.  Over the levels :math:`t_0 < t_1 < ...`, as in Kruskal's algorithm::

    path >= (stages - 1) t_0 + sum_x (t_{x+1} - t_x) (runs at level x - 1)

    level 0   | ab ab | cc cc | dd | ee |      3 hops are slower than t_0
    level 1   | ab ab | cc cc   dd | ee |      2 of these are slower than t_1

Types are few where the limit on data parallelism is strict.  The integer program over how many
groups have each type is small and its bound close.  Where that is not enough, the order of the
types joins in: a circuit over those in use, each visited once, at the distances that detours leave.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from ortools.sat.python import cp_model
from scipy.sparse.csgraph import connected_components

from ray_train_geo.planning.dtfm_classes import ClassProblem
from ray_train_geo.planning.dtfm_solver import Result, run
from ray_train_geo.planning.dtfm_types import as_group, excess_between

__all__ = ["LevelModel"]

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Profile = tuple[tuple[tuple[int, ...], int], ...]

_SCALE = 2.0**40  # units of the least known cost
_BETTER = 2.0**-32
"""Placements count that cost less than the known one by more than this part of it.  That is far
more than what rounding down to units can hide."""


class LevelModel:
    """Placements over ``types`` that cost less than ``cost_s``.

    Args:
        types: ``[types, classes]``, up to orbits: at least one.
        low_s: what data parallelism counts at least.
    """

    def __init__(self, problem: ClassProblem, types: Ints, low_s: float, cost_s: float) -> None:
        self._problem, self._types = problem, types
        self._sync_s = np.array([problem.data_parallel_s(as_group(t)) for t in types])
        self._scale = _SCALE / cost_s
        self._limit = math.floor(_SCALE * (1 - _BETTER))
        self._least_path_s = (problem.stages - 1) * problem.least_hop_s()
        self._slack_s = cost_s - low_s - self._least_path_s
        self._model = cp_model.CpModel()
        room = np.array([sum(problem.sizes[c] for c in orbit) for orbit in problem.orbits])
        used = np.stack([types[:, orbit].sum(axis=1) for orbit in problem.orbits], axis=1)
        # A type stands for all that its orbits make of it: only the orbits' devices limit it.
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

    def solve(self, effort: float, deadline: Callable[[], bool] | None) -> Result:
        """The bound; and the types of the placement that reaches it, in no good order."""
        solver, status = run(self._model, effort, deadline, linearization=2)
        spent = solver.response_proto.deterministic_time
        beyond_s = self._limit / self._scale
        if status == "INFEASIBLE":
            return Result(beyond_s, None, True, spent)
        bound_s = min(solver.best_objective_bound / self._scale, beyond_s)
        groups = None
        if status in ("OPTIMAL", "FEASIBLE") and self._problem.all_distinct:
            groups = tuple(
                as_group(counts)
                for counts, number in zip(self._types, self._number, strict=True)
                for _ in range(solver.value(number))
            )
        return Result(bound_s, groups, status == "OPTIMAL", spent)

    def add_order(self) -> None:
        """Let the hops cost at least what a path over the types in use does.

        Only where all classes are distinct: a type of an orbit stands for several.

        A hop's excess is split: each end pays the half of the least excess that its type ever has.
        The rest is a distance between types; by way of others it may be shorter, so that skipping
        a type that was visited before never makes a path longer.
        """
        between_s = excess_between(self._problem, self._types, self._slack_s)
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
        model.add(self._excess >= cost)

    def _units(self, seconds: float) -> int:
        return math.floor(seconds * self._scale)

    def _data_parallel(self, low_s: float) -> cp_model.LinearExprT:
        """The slowest type's: one step up for each value that a type in use has."""
        steps: dict[int, list[int]] = defaultdict(list)
        for i, sync_s in enumerate(self._sync_s):
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
        for step_s, labels, alone in _levels(self._problem):
            if step_s <= 0:
                continue
            members: dict[Profile, list[int]] = defaultdict(list)
            capacity: dict[Profile, int] = {}
            for i, counts in enumerate(self._types):
                profile, most = self._profile(counts, labels, alone)
                members[profile].append(i)
                capacity[profile] = most
            runs: cp_model.LinearExprT = 0
            for profile, inside in members.items():
                numbers = sum(self._number[i] for i in inside)
                if capacity[profile] <= 1:
                    runs += numbers
                    continue
                count = self._model.new_int_var(0, self._problem.stages, "runs")
                self._model.add(numbers <= capacity[profile] * count)
                runs += count
            total += self._units(step_s) * (runs - 1)
        return total

    def _profile(self, counts: Ints, labels: Ints, alone: NDArray[np.bool_]) -> tuple[Profile, int]:
        """A type's profile, up to orbits, and how many groups in a row can have it."""
        inside = np.bincount(labels, weights=counts).astype(int).tolist()
        sizes = np.bincount(labels, weights=self._problem.sizes).astype(int).tolist()
        orbit_of = {c: o for o, orbit in enumerate(self._problem.orbits) for c in orbit}
        kinds: dict[int, list[int]] = defaultdict(list)
        for c, label in enumerate(labels.tolist()):
            kinds[label].append(orbit_of[c])
        used = [(tuple(sorted(kinds[x])), n) for x, n in enumerate(inside) if n]
        if (counts[alone] > 0).any():
            return tuple(sorted(used)), 1
        runs = [sizes[x] // n for x, n in enumerate(inside) if n]
        return tuple(sorted(used)), min([self._problem.stages, *runs])


def _levels(problem: ClassProblem) -> Iterator[tuple[float, Ints, NDArray[np.bool_]]]:
    """For each level: how far the next is, each class's component, and classes without partners."""
    usable = problem.usable
    hops_s = np.unique(problem.hop_s[usable])
    for low_s, high_s in pairwise(hops_s.tolist()):
        within = usable & (problem.hop_s <= low_s)
        _, labels = connected_components(within, directed=False)
        yield high_s - low_s, labels.astype(np.int64), ~within.any(axis=1)
