"""Runs of equal groups at a level that joins no two nodes of some sites, packed into the nodes.

A hop within such a level keeps every device in its node.  So a run of m groups takes, for a part of
t devices in a node, m * t devices of this node: a *block*::

    run of 3 groups, 2+1 devices of a site:       run of 2 groups, 1+1:
    node a (8)  [ 2 x 3 = 6 ] [ 1 x 2 ]           a node holds blocks as a bin holds items
    node b (4)  [ 1 x 3 ]
    node c (2)                [ 1 x 2 ]

The model counts runs by profile and length, their spreads by site, and nodes by how they are cut
into blocks.  Where all sites are split this is exact: a solution says how to build the groups.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice

from ortools.sat.python import cp_model

from ray_train_geo.planning.dtfm_classes import Group
from ray_train_geo.planning.dtfm_sites import Site, Spread

__all__ = ["Demand", "SplitRuns"]

_MOST_CUTS = 300
"""Ways to cut nodes of one size; where there are more, each node has its own blocks."""

Demand = tuple[int, int, int]
"""Site, how many devices of it, and how many of its spreads (fastest first) are allowed."""
_Spreads = list[tuple[cp_model.IntVar, Spread]]
_Nodes = list[tuple[int, cp_model.IntVar, Counter[int]]]
"""Of the classes on a shelf (by its number), as many as the variable says have these blocks."""


class SplitRuns:
    """The runs of one level.

    Args:
        spreads: by site and count, fastest first.
        lasting: classes whose devices have partners within the level.
        stages: of a pipeline: no run is longer.
    """

    def __init__(
        self,
        model: cp_model.CpModel,
        sites: Sequence[Site],
        spreads: Mapping[tuple[int, int], Sequence[Spread]],
        lasting: Sequence[bool],
        stages: int,
    ) -> None:
        self._model, self._sites, self._spreads = model, sites, spreads
        self._lasting, self._stages = lasting, stages
        self._runs: list[tuple[cp_model.IntVar, int, tuple[Demand, ...], Group]] = []
        self._chosen: dict[tuple[Demand, int], _Spreads] = {}
        self._nodes: dict[tuple[int, int], _Nodes] = {}
        self._shelves: list[list[int]] = []
        self._fitting: dict[tuple[Demand, int], list[Spread]] = {}

    def add_profile(
        self,
        groups: cp_model.LinearExprT,
        demands: Sequence[Demand],
        rest: Group = (),
        longest: int | None = None,
    ) -> cp_model.LinearExprT:
        """Cut ``groups`` of one profile into runs; how many there are.

        Args:
            rest: the classes of the profile's other devices, where each site has one.
            longest: run, by what the other devices allow.
        """
        total: cp_model.LinearExprT = 0
        taken: cp_model.LinearExprT = 0
        for length in range(1, min(longest or self._stages, self._stages) + 1):
            if not all(self._fits(demand, length) for demand in demands):
                break
            runs = self._model.new_int_var(0, self._stages // length, "runs")
            self._runs.append((runs, length, tuple(demands), rest))
            total += runs
            taken += length * runs
        self._model.add(groups == taken)
        return total

    def pack(self) -> None:
        """After the last profile: give every run its spreads, and every block a node."""
        wanted: dict[tuple[Demand, int], list[cp_model.IntVar]] = defaultdict(list)
        for runs, length, demands, _ in self._runs:
            for demand in demands:
                wanted[demand, length].append(runs)
        blocks: dict[tuple[int, int], dict[int, list[cp_model.LinearExprT]]] = {}
        for (demand, length), runs_of_demand in wanted.items():
            chosen: _Spreads = []
            for spread in self._fits(demand, length):
                times = self._model.new_int_var(0, self._stages // length, "spread")
                chosen.append((times, spread))
                for family, parts in enumerate(spread.parts):
                    into = blocks.setdefault((demand[0], family), {})
                    for part, often in Counter(parts).items():
                        into.setdefault(length * part, []).append(often * times)
            self._chosen[demand, length] = chosen
            self._model.add(sum(times for times, _ in chosen) == sum(runs_of_demand))
        for (site, family), needed in blocks.items():
            self._nodes[site, family] = self._cut_nodes(site, family, needed)

    def groups(self, solver: cp_model.CpSolver) -> tuple[Group, ...]:
        """The groups of a solution, those of a run together."""
        spreads = {
            key: iter([s for times, s in chosen for _ in range(solver.value(times))])
            for key, chosen in self._chosen.items()
        }
        shelves = [iter(classes) for classes in self._shelves]
        free: dict[tuple[int, int, int], list[int]] = defaultdict(list)
        for (site, family), nodes in self._nodes.items():
            for shelf, times, cut in nodes:
                for c in islice(shelves[shelf], solver.value(times)):
                    for block, often in cut.items():
                        free[site, family, block] += [c] * often
        made: list[Group] = []
        for runs, length, demands, rest in self._runs:
            for _ in range(solver.value(runs)):
                group = list(rest)
                for demand in demands:
                    for family, parts in enumerate(next(spreads[demand, length]).parts):
                        for part in parts:
                            c = free[demand[0], family, length * part].pop()
                            group += [c] * part
                made += [tuple(sorted(group))] * length
        return tuple(made)

    def _fits(self, demand: Demand, length: int) -> list[Spread]:
        """The allowed spreads that a run of ``length`` can have."""
        found = self._fitting.get((demand, length))
        if found is None:
            index, count, allowed = demand
            site = self._sites[index]
            lasts = [length == 1 or self._lasting[family[0]] for family in site.families]
            found = [
                spread
                for spread in self._spreads[index, count][:allowed]
                if all(last or not parts for parts, last in zip(spread.parts, lasts, strict=True))
                and all(
                    length * part <= size
                    for parts, sizes in zip(spread.parts, site.sizes, strict=True)
                    for part, size in zip(parts, sizes, strict=False)
                )
            ]
            self._fitting[demand, length] = found
        return found

    def _cut_nodes(
        self, site: int, family: int, needed: Mapping[int, Sequence[cp_model.LinearExprT]]
    ) -> _Nodes:
        """Cut a family's nodes into as many blocks of each kind as are needed, at least."""
        nodes: _Nodes = []
        by_size: dict[int, list[int]] = defaultdict(list)
        inside = self._sites[site]
        for c, size in zip(inside.families[family], inside.sizes[family], strict=True):
            by_size[size].append(c)
        for size, classes in by_size.items():
            fitting = sorted((block for block in needed if block <= size), reverse=True)
            cuts = list(islice(_cuts(size, fitting), _MOST_CUTS + 1))
            if len(cuts) <= _MOST_CUTS:
                used = [self._model.new_int_var(0, len(classes), "cut") for _ in cuts]
                self._model.add(sum(used) <= len(classes))
                nodes += [
                    (len(self._shelves), times, cut) for times, cut in zip(used, cuts, strict=True)
                ]
                self._shelves.append(classes)
                continue
            for c in classes:
                own = [self._model.new_int_var(0, size // block, "block") for block in fitting]
                taken = sum(b * times for b, times in zip(fitting, own, strict=True))
                self._model.add(taken <= size)
                for block, times in zip(fitting, own, strict=True):
                    nodes.append((len(self._shelves), times, Counter([block])))
                    self._shelves.append([c] * (size // block))
        for block, often_needed in needed.items():
            made = sum(cut[block] * times for _, times, cut in nodes if block in cut)
            self._model.add(made >= sum(often_needed))
        return nodes


def _cuts(size: int, blocks: Sequence[int]) -> Iterator[Counter[int]]:
    """All ways to cut ``size`` into ``blocks`` (largest first) that leave no room for another."""
    if not blocks:
        yield Counter()
        return
    first, *others = blocks
    least = 0 if others else size // first
    for often in range(size // first, least - 1, -1):
        for cut in _cuts(size - often * first, others):
            yield cut + Counter({first: often})
