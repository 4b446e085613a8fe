"""Plans that have structure: where the local search starts, and often where it ends.

Devices stand in a line, near ones next to each other, in islands (`planning.lines`).  A
construction cuts each island into pipelines in one of two ways::

    island of 8, depth 4        along:  a a a a b b b b     a pipeline stays near itself:
                                                            hops are short, syncs are long
                                across: a b a b a b a b     a stage's holders stay near each
                                                            other: syncs are short, hops long

Islands of every size lie between the two: pipelines along single regions, or across continents.
Across, a node may hold one stage of all pipelines and have devices left; then those of all nodes
may be further stages, anywhere between the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby, zip_longest

import numpy as np

from ray_train_geo.model.catalog import total_parameters
from ray_train_geo.planning.evaluate import Candidate, Chain, Evaluator
from ray_train_geo.planning.lines import Line, lines
from ray_train_geo.planning.pipeline_cost import cut_for
from ray_train_geo.planning.problem import Problem

__all__ = ["Shape", "Sketch", "candidates", "sketches"]

_PROMISING = 2.0
"""A sketch whose compute takes this much longer than the best one's is not estimated."""

_ESTIMATED, _LEAST_ESTIMATED, _MOST_ESTIMATED = 300_000, 60, 1_500
"""Devices in all sketches that are estimated, and how many sketches that is at least, at most."""

_SAMPLES = 6
"""Pipelines that an estimate looks at, over all islands; at least one of the largest ones."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What the job fixes; None is open."""

    stages: int | None = None
    pipelines: int | None = None
    cuts: tuple[tuple[int, ...], ...] | None = None
    max_devices: int | None = None

    @classmethod
    def of(cls, problem: Problem) -> Shape:
        job = problem.job
        boundaries = job.stage_boundaries()
        cuts = None if boundaries is None else tuple(tuple(b) for b in boundaries)
        stages = job.parallelism.stages
        if cuts is not None and len(cuts) == 1:
            stages = len(cuts[0]) - 1
        return cls(stages, job.fixed_pipelines(), cuts, job.scaling.max_devices)

    def cut(self, pipeline: int) -> tuple[int, ...] | None:
        """The boundaries of a pipeline, if they are fixed."""
        return None if self.cuts is None else self.cuts[pipeline % len(self.cuts)]


@dataclass(frozen=True, slots=True)
class Sketch:
    """A line, a depth for each of its islands, and a direction: not yet pipelines.

    Args:
        bound_s: what compute alone takes about.
    """

    line: Line
    depths: tuple[int, ...]
    across: bool
    bound_s: float

    def chains(self) -> tuple[list[tuple[int, ...]], list[int]]:
        """The islands' pipelines, and the devices that are left over."""
        found: list[tuple[int, ...]] = []
        rest: list[int] = []
        for island, depth in zip(self.line, self.depths, strict=True):
            count = len(island) // depth
            used = island[: count * depth]
            rest += island[count * depth :]
            found += (
                (used[p::count] if self.across else used[p * depth : (p + 1) * depth])
                for p in range(count)
            )
        return found, rest

    def on_whole_nodes(self, node: Sequence[int]) -> Iterator[list[tuple[int, ...]]]:
        """Pipelines across the islands with most stages on one node each, if some are left over.

        Args:
            node: of each device.
        """
        if not self.across:
            return
        islands = [
            _whole_stages(island, depth, node)
            for island, depth in zip(self.line, self.depths, strict=True)
            if len(island) >= depth
        ]
        if not all(whole and others for whole, others in islands):
            return
        for place in range(max(len(whole) for whole, _ in islands) + 1):
            found: list[tuple[int, ...]] = []
            for whole, others in islands:
                found += zip(*whole[:place], *others, *whole[place:], strict=True)
            yield found


def _whole_stages(
    island: Sequence[int], depth: int, node: Sequence[int]
) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """``depth`` stages: those on one node, and those of what the nodes have left, if that works."""
    count = len(island) // depth
    whole: list[tuple[int, ...]] = []
    left: list[int] = []
    for _, run in groupby(island, key=node.__getitem__):
        here = tuple(run)
        used = len(here) // count * count
        whole += [here[i : i + count] for i in range(0, used, count)]
        left += here[used:]
    others = [tuple(left[i : i + count]) for i in range(0, len(left) - count + 1, count)]
    if len(whole) + len(others) < depth:
        return [], []
    return whole[: depth - len(others)], others


def sketches(
    evaluator: Evaluator,
    usable: Sequence[int],
    expired: Callable[[], bool] = lambda: False,
) -> list[Sketch]:
    """All sketches that may be good, those with the best estimates first.

    Args:
        expired: whether time is up; then no more are made, nor estimated.
    """
    problem = evaluator.problem
    shape, total = Shape.of(problem), problem.job.training.total_microbatches
    rates = _Rates(problem)
    found: list[Sketch] = []
    best_s = np.inf
    for line in lines(problem, usable, shape.max_devices):
        if found and expired():
            break
        for depths in _depths(problem, line, shape, rates):
            rate = sum(rates.of(island, d) for island, d in zip(line, depths, strict=True))
            if rate <= 0:
                continue
            best_s = min(best_s, total / rate)
            if total / rate <= _PROMISING * best_s:
                found.append(Sketch(line, depths, False, total / rate))
                if max(depths) > 1:
                    found.append(Sketch(line, depths, True, total / rate))
    found = sorted((s for s in found if s.bound_s <= _PROMISING * best_s), key=lambda s: s.bound_s)
    most = _ESTIMATED // max(1, len(usable))
    most = min(max(most, _LEAST_ESTIMATED), _MOST_ESTIMATED)
    chosen = _spread(found, most)
    estimates = [np.inf if expired() else _estimate_s(evaluator, sketch) for sketch in chosen]
    return [chosen[i] for i in sorted(range(len(chosen)), key=estimates.__getitem__)]


def _spread(found: Sequence[Sketch], most: int) -> list[Sketch]:
    """At most so many: line by line in turns, each line's by compute.

    Compute alone does not tell which line is good, only which depths suit it.
    """
    by_line: dict[int, list[Sketch]] = {}
    for sketch in found:
        by_line.setdefault(id(sketch.line), []).append(sketch)
    turns = zip_longest(*by_line.values())
    return [s for turn in turns for s in turn if s is not None][:most]


def candidates(problem: Problem, sketch: Sketch) -> Iterator[Candidate]:
    """The plans of one sketch: with pipelines of what is left over, without, on whole nodes."""
    shape = Shape.of(problem)
    chains, rest = sketch.chains()
    depth = min(sketch.depths)
    more = [tuple(rest[p * depth : (p + 1) * depth]) for p in range(len(rest) // depth)]
    on_nodes = sketch.on_whole_nodes(problem.table.node.tolist())
    for found in (*([[*chains, *more]] if more else []), chains, *on_nodes):
        limited = _limited(problem, shape, found)
        if limited:
            yield tuple(Chain(c, shape.cut(i)) for i, c in enumerate(limited))


def _limited(
    problem: Problem, shape: Shape, chains: Sequence[tuple[int, ...]]
) -> list[tuple[int, ...]]:
    """No more pipelines and devices than allowed: the fastest of them, in their order."""
    speed = [sum(problem.topology.devices[d].flops_per_s for d in c) for c in chains]
    order = sorted(range(len(chains)), key=lambda i: (-speed[i] / len(chains[i]), i))
    if shape.pipelines is not None:
        if len(chains) < shape.pipelines:
            return []
        order = order[: shape.pipelines]
    order = order[: problem.job.training.total_microbatches]
    if shape.max_devices is not None:
        totals = list(accumulate(len(chains[i]) for i in order))
        order = order[: sum(total <= shape.max_devices for total in totals)]
    return [chains[i] for i in sorted(order)]


def _depths(problem: Problem, line: Line, shape: Shape, rates: _Rates) -> Iterator[tuple[int, ...]]:
    """Depths of each island's pipelines: the same everywhere, or the fastest of each."""
    if shape.stages is not None:
        yield (shape.stages,) * len(line)
        return
    layers = problem.dims.layers
    longest = min(layers, max(map(len, line)))
    for depth in range(1, longest + 1):
        yield (depth,) * len(line)
    fastest = tuple(rates.best_depth(island, min(layers, len(island))) for island in line)
    if len(set(fastest)) > 1:
        yield fastest


class _Rates:
    """Microbatches per second of an island's pipelines, by compute alone."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self._islands: dict[tuple[tuple[tuple[int, int], ...], int], float] = {}
        self._chains: dict[tuple[int, ...], float] = {}
        self._runs: dict[int, tuple[tuple[int, int], ...]] = {}

    def of(self, island: Sequence[int], depth: int) -> float:
        """All whole pipelines of ``depth`` along ``island``; 0 if the model fits none of them."""
        kinds = self._problem.kinds
        known = self._runs.get(id(island))
        if known is None:
            runs = groupby(island, key=kinds.__getitem__)
            known = self._runs[id(island)] = tuple((k, len(list(g))) for k, g in runs)
        key = known, depth
        if key not in self._islands:
            self._islands[key] = self._rate(island, known, depth)
        return self._islands[key]

    def _rate(self, island: Sequence[int], runs: tuple[tuple[int, int], ...], depth: int) -> float:
        total, at, start = 0.0, 0, 0
        for _, length in runs:
            end = start + length
            whole = max(0, (end - at) // depth)  # pipelines inside this run
            if whole:
                total += whole * self._chain(island[at : at + depth])
                at += whole * depth
            if at < end and at + depth <= len(island):  # one that begins in this run
                total += self._chain(island[at : at + depth])
                at += depth
            start = end
        return total

    def best_depth(self, island: Sequence[int], most: int) -> int:
        """The depth with the highest rate along ``island``; the shallowest of equals."""
        return max(range(1, most + 1), key=lambda depth: (self.of(island, depth), -depth))

    def _chain(self, chain: Sequence[int]) -> float:
        problem = self._problem
        key = tuple(problem.kinds[d] for d in chain)
        if key not in self._chains:
            cut = cut_for(problem, chain, 2, 2 if problem.gpipe else 1)
            rate = 0.0
            if cut is not None:
                work = problem.work
                times = [
                    (b - a) * sum(work.layer[d])
                    for a, b, d in zip(cut, cut[1:], chain, strict=False)
                ]
                times[0] += sum(work.embedding[chain[0]])
                times[-1] += sum(work.head[chain[-1]])
                rate = 1 / max(times)
            self._chains[key] = rate
        return self._chains[key]


def _estimate_s(evaluator: Evaluator, sketch: Sketch) -> float:
    """About what a step takes: a few pipelines stand for all of them."""
    problem = evaluator.problem
    table, total = problem.table, problem.job.training.total_microbatches
    counts = [len(i) // d for i, d in zip(sketch.line, sketch.depths, strict=True)]
    count = sum(counts)
    largest = sorted(range(len(counts)), key=lambda i: -len(sketch.line[i]))[:_SAMPLES]
    each = max(1, _SAMPLES // len(largest))
    rate = sampled = 0.0
    samples: list[tuple[int, ...]] = []
    for i in largest:
        island, depth, here = sketch.line[i], sketch.depths[i], counts[i]
        if not here:
            continue
        used = island[: here * depth]
        picks = sorted({p * (here - 1) // max(1, each - 1) for p in range(min(each, here))})
        for p in picks:
            chain = used[p::here] if sketch.across else used[p * depth : (p + 1) * depth]
            samples.append(chain)
            cost = evaluator.pipeline(Chain(chain), count, -(-total // count))
            if cost is not None:
                rate += here / len(picks) / cost.period_s
        sampled += here
    if rate <= 0:
        return float("inf")
    compute_s = total / (rate * count / sampled)
    if count == 1:
        return compute_s
    ends = np.array([[chain[0], chain[-1]] for chain in samples])
    latency, per_byte = table.hops(ends[:, None, :], ends[None, :, :])
    size = problem.gradient_bytes * total_parameters(problem.dims) / max(sketch.depths)
    nodes = table.node[np.array([d for i in sketch.line for d in i])]
    nic = np.bincount(nodes, minlength=len(table.nodes)) * table.out_seconds_per_byte
    crossing = len(np.unique(table.region[ends[:, 0]])) > 1
    uplink = float(table.uplink_seconds_per_byte.max()) * size * count if crossing else 0.0
    pairs = float((latency + size / count * per_byte).max())
    return compute_s + 2 * max(pairs, float(nic.max()) * size, uplink)
