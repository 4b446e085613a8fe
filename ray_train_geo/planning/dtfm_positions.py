"""Placements by position: CP-SAT over how many devices of each class each group of the path has.

Costs are rounded down to integers, so that a bound on the integers is a bound on the cost.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
from ortools.sat.python import cp_model
from scipy.sparse.csgraph import connected_components

from ray_train_geo.planning.dtfm_classes import ClassProblem
from ray_train_geo.planning.dtfm_solver import Result, run

__all__ = ["PositionModel"]

_PRECISION = 2.0**-40
"""Costs are rounded to this part of the upper bound."""


class PositionModel:
    """Placements of one piece that cost less than ``cost_s``.

    ``count[k][c]`` devices of class c are in group k, and ``flow[c, d]`` pairs go from class c in
    group k to class d in the next: a perfect matching within a threshold is a flow over pairs of
    classes within it.  ``above[x]`` says that hop k is slower than level x.
    """

    def __init__(
        self,
        problem: ClassProblem,
        low_s: float,
        high_s: float,
        lower_bound_s: float,
        cost_s: float,
    ) -> None:
        self._problem = problem
        self._scale = 1 / (cost_s * _PRECISION) if cost_s > 0 else 1.0
        self._model = cp_model.CpModel()
        self._sync = np.floor(problem.sync_s * self._scale).astype(np.int64)
        self._hop = np.floor(problem.hop_s * self._scale).astype(np.int64)
        self._classes = range(len(problem.sizes))
        self._most = [min(n, problem.replicas) for n in problem.sizes]
        self._count = self._counts()
        high = math.ceil(high_s * self._scale)
        low = min(high, math.floor(low_s * self._scale))
        self._slowest = self._model.new_int_var(low, high, "slowest")
        self._add_data_parallel(low, high)
        objective = self._slowest + self._add_hops()
        self._break_symmetry()
        # Rounding can hide less than one unit for each addend.
        addends = problem.replicas + problem.stages
        self._model.add(objective <= math.floor(cost_s * self._scale) - addends)
        self._beyond_s = cost_s - (addends + 1) / self._scale
        self._model.add(objective >= math.floor(lower_bound_s * self._scale) - addends)
        self._model.minimize(objective)

    def solve(self, effort: float, deadline: Callable[[], bool] | None) -> Result:
        """The bound, and the best groups in their order."""
        solver, status = run(self._model, effort, deadline)
        spent = solver.response_proto.deterministic_time
        if status == "INFEASIBLE":
            return Result(self._beyond_s, None, True, spent)
        bound_s = min(solver.best_objective_bound / self._scale, self._beyond_s)
        if status not in ("OPTIMAL", "FEASIBLE"):
            return Result(bound_s, None, False, spent)
        groups = tuple(
            tuple(c for c in self._classes for _ in range(solver.value(counts[c])))
            for counts in self._count
        )
        return Result(bound_s, groups, status == "OPTIMAL", spent)

    def _counts(self) -> list[list[cp_model.IntVar]]:
        problem = self._problem
        count = [
            [self._model.new_int_var(0, self._most[c], f"count{k},{c}") for c in self._classes]
            for k in range(problem.stages)
        ]
        for group in count:
            self._model.add(sum(group) == problem.replicas)
        for c in self._classes:
            self._model.add(sum(group[c] for group in count) <= problem.sizes[c])
        if sum(problem.sizes) == problem.stages * problem.replicas:
            for c in self._classes:
                self._model.add(sum(group[c] for group in count) == problem.sizes[c])
        return count

    def _add_data_parallel(self, low: int, high: int) -> None:
        least = {(c, d): self._least_with_both(c, d) for c in self._classes for d in range(c)}
        for k, group in enumerate(self._count):
            present = [self._model.new_bool_var(f"present{k},{c}") for c in self._classes]
            for c, is_present in enumerate(present):
                self._model.add(group[c] >= 1).only_enforce_if(is_present)
                self._model.add(group[c] == 0).only_enforce_if(~is_present)
                exchanged = sum(int(self._sync[c, d]) * group[d] for d in self._classes)
                self._model.add(exchanged - int(self._sync[c, c]) <= self._slowest).only_enforce_if(
                    is_present
                )
            for (c, d), with_both in least.items():
                if with_both > high:
                    self._model.add_bool_or(~present[c], ~present[d])
                elif with_both > low:  # implied, but not seen by propagation
                    self._model.add(self._slowest >= with_both).only_enforce_if(
                        present[c], present[d]
                    )

    def _least_with_both(self, c: int, d: int) -> int:
        """The least data parallelism of a group that has a device of c and one of d."""

        def least(own: int, other: int) -> int:
            total, wanted = int(self._sync[own, other]), self._problem.replicas - 2
            for e in np.argsort(self._sync[own], kind="stable"):
                taken = min(wanted, self._problem.sizes[e] - (e in (own, other)))
                total += taken * int(self._sync[own, e])
                wanted -= taken
            return total

        return max(least(c, d), least(d, c))

    def _add_hops(self) -> cp_model.LinearExprT:
        usable = self._problem.usable
        pairs = [(int(c), int(d)) for c, d in np.argwhere(usable)]
        levels = sorted({int(self._hop[pair]) for pair in pairs})
        total: cp_model.LinearExprT = 0
        for k in range(self._problem.stages - 1):
            above = [self._model.new_bool_var(f"above{k},{x}") for x in range(len(levels) - 1)]
            for lower, higher in pairwise(above):
                self._model.add_implication(higher, lower)
            flow = {}
            for c, d in pairs:
                most = min(self._most[c], self._most[d])
                flow[c, d] = self._model.new_int_var(0, most, f"flow{k},{c},{d}")
                level = levels.index(int(self._hop[c, d]))
                if level:
                    self._model.add(flow[c, d] == 0).only_enforce_if(~above[level - 1])
            here, there = self._count[k], self._count[k + 1]
            for c in self._classes:
                self._model.add(sum(flow[c, d] for d in self._classes if usable[c, d]) == here[c])
                self._model.add(sum(flow[d, c] for d in self._classes if usable[d, c]) == there[c])
            self._keep_components(here, there, levels, above)
            total += levels[0] + sum(
                (high - low) * over
                for low, high, over in zip(levels, levels[1:], above, strict=False)
            )
        return total

    def _keep_components(
        self,
        here: list[cp_model.IntVar],
        there: list[cp_model.IntVar],
        levels: list[int],
        above: list[cp_model.IntVar],
    ) -> None:
        """Implied by the flow: a hop within a threshold never leaves a connected component."""
        known: tuple[int, ...] = ()
        for level, over in zip(levels, above, strict=False):
            _, labels = connected_components((self._hop <= level) & self._problem.usable)
            components = tuple(map(int, labels))
            if components == known:
                continue
            known = components
            if max(components) == 0:
                return
            for component in set(components):
                inside = [c for c in self._classes if components[c] == component]
                self._model.add(
                    sum(here[c] for c in inside) == sum(there[c] for c in inside)
                ).only_enforce_if(~over)

    def _break_symmetry(self) -> None:
        """Of placements that are the same but for names, keep one.

        Classes that can take each other's place come in the order of their counts over the stages;
        a path and its reverse cost the same, so the first group comes before the last.
        """
        orbits = self._problem.orbits
        for orbit in orbits:
            for c, d in pairwise(orbit):
                self._order_lexically(c, d)
        weight = {c: i for i, orbit in enumerate(orbits, start=1) for c in orbit}
        first, last = self._count[0], self._count[-1]
        self._model.add(
            sum(weight[c] * first[c] for c in self._classes)
            <= sum(weight[c] * last[c] for c in self._classes)
        )

    def _order_lexically(self, c: int, d: int) -> None:
        """``count[.][c] >= count[.][d]``, the first stages first."""
        equal_so_far: list[cp_model.IntVar] = []
        for k, group in enumerate(self._count):
            self._model.add(group[c] >= group[d]).only_enforce_if(equal_so_far)
            equal = self._model.new_bool_var(f"equal{k},{c},{d}")
            self._model.add(group[c] == group[d]).only_enforce_if(equal)
            self._model.add(group[c] >= group[d] + 1).only_enforce_if([*equal_so_far, ~equal])
            equal_so_far = [*equal_so_far, equal]
