"""Megatron-LM (Narayanan et al., SC 2021): tensor, pipeline and data parallelism.

1F1B with neighbours that meet to exchange messages (:mod:`.rendezvous`); two all-reduces of a
microbatch's activations per layer and pass inside a tensor-parallel group; a ring all-reduce of
gradients over the replicas of a stage.  The output head is on the last stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from statistics import fmean

from ray_train_geo.model.catalog import embedding_parameters, layer_parameters
from ray_train_geo.planning.partition import even
from ray_train_geo.systems.case import Case, Outcome
from ray_train_geo.systems.collectives import all_reduce_s, ring
from ray_train_geo.systems.layouts import Grid, megatron_grid, shuffled
from ray_train_geo.systems.rendezvous import Exchange, makespan_s
from ray_train_geo.systems.shares import Rate, equal_shares

__all__ = ["default_placement", "random_placement"]


def default_placement(case: Case) -> Outcome:
    """With ranks in the order of nodes."""
    return _mean(case, [list(range(len(case.topology.devices)))])


def random_placement(case: Case) -> Outcome:
    """With ranks in random order; the mean over the seeds."""
    count = len(case.topology.devices)
    return _mean(case, [shuffled(count, seed) for seed in range(case.values.whole("seeds"))])


def _mean(case: Case, orders: Sequence[list[int]]) -> Outcome:
    tensor = case.values.whole("tensor")
    stages, _ = case.grid(tensor)
    found = [_step(case, megatron_grid(order, tensor, stages)) for order in orders]
    return Outcome({key: fmean(f[key] for f in found) for key in found[0]})


def _step(case: Case, grid: Grid) -> dict[str, float]:
    stages, replicas, tensor = len(grid[0]), len(grid), len(grid[0][0])
    figures = case.constants.megatron
    fp32 = case.precision == "fp32"
    factor = figures.fp32_compute_factor if fp32 else figures.compute_factor
    microbatches = case.microbatches(replicas)
    cuts = even(case.dims.layers, stages)
    layers = [end - first for first, end in pairwise(cuts)]
    reduce_s = _tensor_s(case, grid)
    passes = 3 if case.values.flag("recompute") else 2
    exchanges = _exchanges(case, grid)
    compute_s, pipeline_s = 0.0, 0.0
    known: dict[object, float] = {}
    for r, chain in enumerate(grid):
        forward, backward, work = [], [], []
        for s, group in enumerate(chain):
            rate = min(case.rates(list(group))) * factor
            f, b = case.stage_s(rate, layers[s], head=s == stages - 1, shards=tensor)
            work.append(f + b)
            forward.append(f + layers[s] * reduce_s[r][s])
            backward.append(b + layers[s] * (passes - 1) * reduce_s[r][s])
        key = tuple(forward), tuple(backward), tuple(exchanges[r])
        if key not in known:
            known[key] = makespan_s(forward, backward, exchanges[r], microbatches)
        pipeline_s = max(pipeline_s, known[key])
        compute_s = max(compute_s, microbatches * max(work))
    return {
        "compute": min(compute_s, pipeline_s),
        "pipeline": pipeline_s - min(compute_s, pipeline_s),
        "gradient_sync": _sync_s(case, grid, layers),
    }


def _exchanges(case: Case, grid: Grid) -> list[list[Exchange]]:
    """``[replicas][stages - 1]``; even hops meet at one time, odd ones at another."""
    figures = case.constants.megatron
    found: list[list[Exchange]] = [[] for _ in grid]
    for s in range(len(grid[0]) - 1):
        here = [(chain[s][t], chain[s + 1][t]) for chain in grid for t in range(len(chain[s]))]
        beside = [
            (chain[q][t], chain[q + 1][t])
            for q in range(s % 2, len(grid[0]) - 1, 2)
            if q != s
            for chain in grid
            for t in range(len(chain[q]))
        ]
        rates = equal_shares(case.table, here + beside, figures.shared_nic_factor)
        width = len(grid[0][0])
        for r in range(len(grid)):
            found[r].append(_exchange(case, rates[r * width : (r + 1) * width]))
    return found


def _exchange(case: Case, rates: Sequence[Rate]) -> Exchange:
    """Of one replica: each tensor-parallel rank sends its part of the message."""
    figures = case.constants.megatron
    per_byte = max(max(figures.transfer_factor * rate.link, rate.shared) for rate in rates)
    latency_s = max(figures.latency_factor * rate.latency_s for rate in rates)
    return Exchange(per_byte * case.message_bytes / len(rates), latency_s)


def _tensor_s(case: Case, grid: Grid) -> list[list[float]]:
    """``[replicas][stages]``; seconds that a layer's pass spends in all-reduces of activations."""
    found = []
    nvlink = 1 / (case.constants.hardware.nvlink_gbytes_per_s * 1e9)
    table, message = case.collectives, case.message_bytes
    shared = equal_shares(table, [f for chain in grid for group in chain for f in ring(group)])
    at = 0
    for chain in grid:
        found.append([0.0] * len(chain))
        for s, group in enumerate(chain):
            mine, at = shared[at : at + len(ring(group))], at + len(ring(group))
            if not mine:
                continue
            part = 2 * (len(group) - 1) / len(group)
            inside = len({int(table.node[d]) for d in group}) == 1
            per_byte = nvlink if inside else max(rate.per_byte for rate in mine)
            around_s = 2 * sum(rate.latency_s for rate in mine)
            found[-1][s] = 2 * (part * per_byte * message + around_s)
    return found


def _sync_s(case: Case, grid: Grid, layers: Sequence[int]) -> float:
    if len(grid) == 1:
        return 0.0
    tensor, stages = len(grid[0][0]), len(layers)
    groups, sizes = [], []
    for s, count in enumerate(layers):
        size = float(count * layer_parameters(case.dims))
        if s in (0, stages - 1):
            size += embedding_parameters(case.dims)
        for t in range(tensor):
            groups.append([chain[s][t] for chain in grid])
            sizes.append(case.element_bytes * size / tensor)
    return all_reduce_s(case.collectives, groups, sizes)
