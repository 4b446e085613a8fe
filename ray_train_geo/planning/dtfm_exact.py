"""The least of DT-FM's cost, proven piece by piece.

The cost adds the slowest group's data parallelism T to the hops, and a relaxation can trade one for
the other almost freely.  So the range of T is cut into pieces, each proven by itself: where T is
small, far classes can't share a group; where it is large, hops must be small::

    T:   least |------|------|------|------------| upper - least hops
                proven proven  open     proven         an open piece is halved

T takes few values where links are alike, so a piece begins and ends at one that T can take, and
halving ends at pieces of one value.  A piece is given to up to three models, until one closes it:
how often the path must leave a level of links (``dtfm_levels``); that with the order of the types
of groups, where these are few; and all devices by position (``dtfm_positions``).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from ray_train_geo.planning.dtfm_classes import ClassProblem, Group
from ray_train_geo.planning.dtfm_levels import LevelModel
from ray_train_geo.planning.dtfm_positions import PositionModel
from ray_train_geo.planning.dtfm_sites import sites_of
from ray_train_geo.planning.dtfm_solver import Result
from ray_train_geo.planning.dtfm_types import Types, group_types

__all__ = ["Minimum", "minimum", "sketch"]

_PIECES = 6
_FIRST_EFFORT, _GROWTH = 1.5, 1.5  # of a piece, and of its halves
_MOST_TYPES, _MOST_ORDERED_TYPES = 600, 160
_SKETCH_EFFORT = 2.4
_ORDER_EFFORT = 10.0  # times that of a piece: what it proves, no halving improves
_EQUAL = 1e-9
"""Bounds that are closer to a cost than this part of it are equal to it: so is its own rounding."""


@dataclass(frozen=True, slots=True)
class Minimum:
    """What is known of the least cost.

    Args:
        lower_bound_s: no placement costs less.
        groups: a placement that costs less than the given one, or None.
        cost_s: of ``groups``, or of the given one.
        effort: spent, in CP-SAT's deterministic seconds.
    """

    lower_bound_s: float
    groups: tuple[Group, ...] | None
    cost_s: float
    effort: float

    @property
    def proven(self) -> bool:
        return self.lower_bound_s == self.cost_s


@dataclass(frozen=True, slots=True)
class _Piece:
    """Placements whose data parallelism takes up to ``high_s`` and counts as ``low_s`` at least."""

    low_s: float
    high_s: float
    lower_bound_s: float
    effort: float


def minimum(
    problem: ClassProblem,
    upper_s: float,
    effort: float,
    deadline: Callable[[], bool] | None = None,
) -> Minimum:
    """The least cost of ``problem``, of which a placement is known to cost ``upper_s``.

    Args:
        effort: the most of CP-SAT's deterministic seconds (one to eight real ones each) to
            spend; what is not proven by then leaves ``lower_bound_s`` below ``cost_s``.
        deadline: asked several times a second, from a second thread too; true stops as if
            ``effort`` were spent.
    """
    proof = _Proof(problem, upper_s, deadline)
    return proof.finish(proof.count_runs_of_all(effort, _FIRST_EFFORT), effort)


def sketch(
    problem: ClassProblem, upper_s: float, deadline: Callable[[], bool] | None = None
) -> tuple[Group, ...] | None:
    """A placement that costs less than ``upper_s``, if the cheapest model meets one."""
    proof = _Proof(problem, upper_s, deadline)
    proof.count_runs_of_all(_SKETCH_EFFORT, _SKETCH_EFFORT / 2)
    return proof.groups


class _Proof:
    """The pieces that are open, and the best placement so far."""

    def __init__(
        self, problem: ClassProblem, upper_s: float, deadline: Callable[[], bool] | None
    ) -> None:
        self._problem = problem
        self._sites = sites_of(problem)
        self._deadline = deadline
        self._cost_s = upper_s
        self.groups: tuple[Group, ...] | None = None
        self._spent = 0.0
        self._hops_s = (problem.stages - 1) * problem.least_hop_s()
        types = self._types(upper_s - self._hops_s, _MOST_TYPES)
        self._values_s = None if types is None else types.data_parallel_s()

    def count_runs_of_all(self, effort: float, each: float) -> list[_Piece]:
        """Each piece of the range, with its bound by levels as far as ``effort`` goes."""
        pieces = []
        for piece in self._cut():
            granted = min(each, effort - self._spent)
            if granted > 0 and not self._late():
                piece = replace(piece, lower_bound_s=self._count_runs(piece, granted))
            pieces.append(piece)
        return pieces

    def finish(self, left: list[_Piece], effort: float) -> Minimum:
        """Close one open piece after the other."""
        closed_s = math.inf
        while left and self._spent < effort and not self._late():
            # The weakest bound first: it is the bound of all.
            piece = left.pop(min(range(len(left)), key=lambda i: left[i].lower_bound_s))
            if self._closes(piece.lower_bound_s):
                closed_s = min(closed_s, piece.lower_bound_s)
            elif self._worth_halving(piece):
                left += [self._counted(half, effort) for half in self._halves(piece)]
            else:
                granted = min(piece.effort, effort - self._spent)
                bound_s, finished = self._examine(piece, granted)
                if finished or self._closes(bound_s):
                    closed_s = min(closed_s, bound_s)
                    continue
                piece = replace(piece, lower_bound_s=bound_s, effort=_GROWTH * piece.effort)
                left += [self._counted(half, effort) for half in self._halves(piece)]
        lower_s = min([closed_s, self._cost_s, *(piece.lower_bound_s for piece in left)])
        if self._closes(lower_s):
            lower_s = self._cost_s
        return Minimum(lower_s, self.groups, self._cost_s, self._spent)

    def _counted(self, piece: _Piece, effort: float) -> _Piece:
        """The piece with the bound by levels, if there is effort left."""
        granted = min(piece.effort, effort - self._spent)
        if granted <= 0 or self._closes(piece.lower_bound_s) or self._late():
            return piece
        return replace(piece, lower_bound_s=self._count_runs(piece, granted, prove=True))

    def _cut(self) -> list[_Piece]:
        least_s = self._problem.least_data_parallel_s()
        most_s = max(least_s, self._cost_s - self._hops_s)
        cuts = map(float, np.linspace(self._below(least_s), most_s, _PIECES + 1))
        whole = _Piece(least_s, most_s, least_s + self._hops_s, _FIRST_EFFORT)
        return [piece for a, b in pairwise(cuts) for piece in self._part(whole, a, b)]

    def _halves(self, piece: _Piece) -> list[_Piece]:
        if self._narrow(piece):
            return [piece]
        below_s, middle_s = self._below(piece.low_s), (piece.low_s + piece.high_s) / 2
        return [
            *self._part(piece, below_s, middle_s),
            *self._part(piece, middle_s, piece.high_s),
        ]

    def _part(self, piece: _Piece, low_s: float, high_s: float) -> list[_Piece]:
        """What of the piece takes more than ``low_s`` and up to ``high_s``: a piece or none."""
        if self._values_s is not None:
            inside = self._values_s[(self._values_s > low_s) & (self._values_s <= high_s)]
            if len(inside) == 0:
                return []
            low_s, high_s = float(inside[0]), float(inside[-1])
        bound_s = max(piece.lower_bound_s, low_s + self._hops_s)
        return [_Piece(low_s, high_s, bound_s, piece.effort)]

    def _below(self, seconds: float) -> float:
        """A little less, also where data parallelism takes no time at all."""
        return seconds - _EQUAL * self._cost_s

    def _narrow(self, piece: _Piece) -> bool:
        return piece.high_s - piece.low_s <= _EQUAL * self._cost_s

    def _worth_halving(self, piece: _Piece) -> bool:
        """Whether counting runs is so much cheaper than the other models that it goes on."""
        several = len(self._sites) < len(self._problem.sizes)
        return several and self._values_s is not None and not self._narrow(piece)

    def _types(self, most_s: float, limit: int) -> Types | None:
        return group_types(self._problem, self._sites, most_s * (1 + _EQUAL), limit)

    def _count_runs(self, piece: _Piece, effort: float, prove: bool = False) -> float:
        """The piece's bound by levels: cheap, and its types may make a better placement."""
        types = self._types(piece.high_s, _MOST_TYPES)
        if types is None:
            return piece.lower_bound_s
        if len(types.counts) == 0:
            return self._cost_s
        levels = LevelModel(self._problem, self._sites, types, piece.low_s, self._cost_s)
        result = levels.solve(effort, self._deadline, prove)
        return max(piece.lower_bound_s, self._note(result))

    def _examine(self, piece: _Piece, effort: float) -> tuple[float, bool]:
        """The piece's bound, and whether there is nothing left to find in it."""
        bound_s = piece.lower_bound_s
        types = self._types(piece.high_s, _MOST_ORDERED_TYPES)
        if types is not None and len(types.counts):
            levels = LevelModel(self._problem, self._sites, types, piece.low_s, self._cost_s)
            levels.add_order()
            result = levels.solve(_ORDER_EFFORT * effort, self._deadline)
            bound_s = max(bound_s, self._note(result))
            if self._closes(bound_s) or not result.finished:
                return bound_s, False
        model = PositionModel(
            self._problem, piece.low_s, piece.high_s * (1 + _EQUAL), bound_s, self._cost_s
        )
        result = model.solve(effort, self._deadline)
        return max(bound_s, self._note(result)), result.finished

    def _note(self, result: Result) -> float:
        """Keep what a model found, and return its bound."""
        self._spent += result.effort
        if result.groups is not None:
            for groups in (result.groups, self._problem.ordered(result.groups)):
                cost_s = self._problem.cost_s(groups)
                if cost_s < self._cost_s:
                    self.groups, self._cost_s = groups, cost_s
        return result.lower_bound_s

    def _closes(self, bound_s: float) -> bool:
        return bound_s >= self._cost_s * (1 - _EQUAL)

    def _late(self) -> bool:
        return self._deadline is not None and self._deadline()
