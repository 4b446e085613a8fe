"""Good placements under DT-FM's cost: construct a few, then anneal the best of them.

A hop is cheap where two groups hold the same classes, so good placements are made of *runs* of
equal groups.  A class gives a run of length m one *column* for every m of its devices::

    run length 2      run 1     run 2
                     g0  g1    g2  g3
      column 0        a   a     c   c      class a has 4 devices: two columns
      column 1        a   a     d   d

The construction tries each run length; annealing swaps columns between runs, not only devices.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial.distance import squareform

from ray_train_geo.planning.dtfm_classes import ClassProblem, Group

__all__ = ["search"]

_STARTS = 3
_MOST_FIRSTS = 32
_HOT, _COLD = 0.1, 0.001  # temperatures, as parts of the first cost
_MOST_REMEMBERED = 200_000


def search(
    problem: ClassProblem,
    seed: int,
    moves: int,
    starts: Sequence[Sequence[Group]] = (),
    deadline: Callable[[], bool] | None = None,
) -> tuple[Group, ...]:
    """Groups of a low cost, in pipeline order; the same for the same ``seed`` and ``moves``.

    Args:
        moves: tried in all.
        starts: placements to start from, besides those that are constructed.
        deadline: asked between moves; true stops the search with the best that it has.
    """
    known = sorted([*map(tuple, starts), *_constructed(problem)], key=problem.cost_s)[:_STARTS]
    best = known[0]
    if sum(problem.sizes) == problem.replicas:
        return best
    random = np.random.default_rng(seed)
    for start in known:
        annealing = _Annealing(problem, start, random)
        annealing.run(moves // len(known), deadline)
        best = min(best, annealing.best, key=problem.cost_s)
    return best


def _constructed(problem: ClassProblem) -> list[tuple[Group, ...]]:
    """One placement for each run length, and for each class to begin with if some are left out."""
    near = _near_classes_together(problem)
    spare = sum(problem.sizes) > problem.stages * problem.replicas
    firsts = range(min(len(near), _MOST_FIRSTS)) if spare else range(1)
    found = [groups for i in firsts for groups in _by_run_length(problem, near[i:] + near[:i])]
    return list(dict.fromkeys(found))


def _by_run_length(problem: ClassProblem, near: list[int]) -> Iterator[tuple[Group, ...]]:
    for run in range(1, problem.stages + 1):
        columns = [c for c in near for _ in range(problem.sizes[c] // run)]
        runs = problem.stages // run
        columns = columns[: min(runs, len(columns) // problem.replicas) * problem.replicas]
        if not columns:
            break  # longer runs have even fewer
        groups = [
            tuple(sorted(columns[i : i + problem.replicas]))
            for i in range(0, len(columns), problem.replicas)
            for _ in range(run)
        ]
        rest = [c for c in near for _ in range(problem.sizes[c] - run * columns.count(c))]
        wanted = problem.stages - len(groups)
        groups += [
            tuple(sorted(rest[i * problem.replicas : (i + 1) * problem.replicas]))
            for i in range(wanted)
        ]
        yield problem.ordered(groups)


def _near_classes_together(problem: ClassProblem) -> list[int]:
    """Classes as the leaves of their average-linkage tree."""
    if len(problem.sizes) == 1:
        return [0]
    distances = problem.sync_s.copy()
    np.fill_diagonal(distances, 0.0)
    return [int(c) for c in leaves_list(linkage(squareform(distances), "average"))]


class _Annealing:
    """Simulated annealing from one placement; the groups' order is part of the state."""

    def __init__(
        self, problem: ClassProblem, groups: Sequence[Group], random: np.random.Generator
    ) -> None:
        self._problem = problem
        self._random = random
        self._groups = list(groups)
        used = np.bincount([c for group in groups for c in group], minlength=len(problem.sizes))
        self._spare = [c for c, n in enumerate(problem.sizes) for _ in range(n - int(used[c]))]
        self._cost_s = problem.cost_s(self._groups)
        self._best_s = self._cost_s
        self.best = tuple(groups)

    def run(self, moves: int, deadline: Callable[[], bool] | None) -> None:
        first_s = self._cost_s
        for move in range(moves):
            if deadline is not None and deadline():
                return
            kelvin = first_s * _HOT * (_COLD / _HOT) ** (move / moves)
            kind = self._random.random()
            if kind < 0.15:
                self._reverse(kelvin)
            elif self._spare and kind < 0.3:
                self._exchange_spare(kelvin)
            elif kind < 0.65:
                self._align(kelvin)
            elif self._problem.stages > 1:
                self._swap_columns(kelvin)
            self._problem.forget(_MOST_REMEMBERED)

    def _swap_columns(self, kelvin: float) -> None:
        """Swap one class for another between two runs of positions, mostly of one."""
        stages = self._problem.stages
        longest = stages // 2
        length = 1 if self._random.random() < 0.4 else int(self._random.integers(1, longest + 1))
        i, j = sorted(int(x) for x in self._random.integers(0, stages - length + 1, 2))
        if j - i < length:
            return
        c, d = self._any_of(self._groups[i]), self._any_of(self._groups[j])
        if c == d:
            return
        changed = {}
        for a, b in zip(range(i, i + length), range(j, j + length), strict=True):
            if c in self._groups[a] and d in self._groups[b]:
                changed[a] = _replaced(self._groups[a], c, d)
                changed[b] = _replaced(self._groups[b], d, c)
        self._try(changed, kelvin)

    def _align(self, kelvin: float) -> None:
        """Make a group more like its neighbour, with classes that other groups give it."""
        stages = self._problem.stages
        i = int(self._random.integers(stages))
        j = i + (1 if self._random.random() < 0.5 else -1)
        if not 0 <= j < stages:
            return
        model, own = Counter(self._groups[i]), Counter(self._groups[j])
        wanted = sorted((model - own).elements())
        unwanted = sorted((own - model).elements())
        if not wanted:
            return
        self._random.shuffle(wanted)
        self._random.shuffle(unwanted)
        count = len(wanted) if self._random.random() < 0.5 else 1
        changed = {j: self._groups[j]}
        for c, d in zip(wanted[:count], unwanted, strict=False):
            givers = [
                k for k in range(stages) if k not in (i, j) and c in changed.get(k, self._groups[k])
            ]
            if givers:
                k = givers[int(self._random.integers(len(givers)))]
                changed[k] = _replaced(changed.get(k, self._groups[k]), c, d)
                changed[j] = _replaced(changed[j], d, c)
        self._try(changed, kelvin)

    def _exchange_spare(self, kelvin: float) -> None:
        k = int(self._random.integers(self._problem.stages))
        s = int(self._random.integers(len(self._spare)))
        c, d = self._any_of(self._groups[k]), self._spare[s]
        if c != d and self._try({k: _replaced(self._groups[k], c, d)}, kelvin):
            self._spare[s] = c

    def _reverse(self, kelvin: float) -> None:
        i, j = sorted(int(x) for x in self._random.integers(0, self._problem.stages, 2))
        part = self._groups[i : j + 1][::-1]
        self._try(dict(zip(range(i, j + 1), part, strict=True)), kelvin)

    def _any_of(self, group: Group) -> int:
        return group[int(self._random.integers(len(group)))]

    def _try(self, changed: dict[int, Group], kelvin: float) -> bool:
        """Take the changed groups if they cost less, or not much more (Metropolis)."""
        groups = self._groups.copy()
        for k, group in changed.items():
            groups[k] = group
        cost_s = self._problem.cost_s(groups)
        worse_s = cost_s - self._cost_s
        if worse_s > 0 and kelvin * self._random.exponential() <= worse_s:
            return False
        self._groups, self._cost_s = groups, cost_s
        if cost_s < self._best_s:
            self._best_s, self.best = cost_s, tuple(groups)
        return True


def _replaced(group: Group, old: int, new: int) -> Group:
    left = list(group)
    left[left.index(old)] = new
    return tuple(sorted(left))
