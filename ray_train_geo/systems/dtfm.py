"""DT-FM as it was measured (Yuan et al., NeurIPS 2022): GPipe in rounds, then a central PS.

A replica does its microbatches in rounds of at most 64, forwards first; a stage sends a message
before it computes on.  After the last round every stage's replicas reduce their gradients along a
chain, in the order of their devices, to one of them, which steps and broadcasts the parameters.
The task is a classification: an embedding, but no output head.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from statistics import fmean

from ray_train_geo.model.catalog import embedding_parameters, layer_parameters
from ray_train_geo.planning.partition import even
from ray_train_geo.planning.shared_flows import SharedFlows
from ray_train_geo.schedule.gpipe import gpipe
from ray_train_geo.schedule.one_f_one_b import one_f_one_b
from ray_train_geo.schedule.timeline import Timeline
from ray_train_geo.simulation.engine import simulate
from ray_train_geo.simulation.noise import paces
from ray_train_geo.simulation.work import Flow, PipelineWork
from ray_train_geo.systems.case import Case, Outcome
from ray_train_geo.systems.collectives import reduce_and_broadcast_s
from ray_train_geo.systems.layouts import Grid, dtfm_grid, megatron_grid, shuffled, shuffled_nodes
from ray_train_geo.systems.simulated import TracedPipeline

__all__ = ["random_complete", "random_fair", "scheduled", "single_pipeline"]

_ROUND = 64
"""Microbatches of a round."""


def scheduled(case: Case) -> Outcome:
    """With the placement that DT-FM's own cost calls best."""
    stages, replicas = case.grid()
    grid = dtfm_grid(case.scenario, case.nominal, stages, replicas)
    return _mean(case, [grid])


def random_complete(case: Case) -> Outcome:
    """With devices in random order; the mean over the seeds."""
    stages, _ = case.grid()
    count = len(case.topology.devices)
    seeds = range(case.values.whole("seeds"))
    return _mean(case, [megatron_grid(shuffled(count, seed), 1, stages) for seed in seeds])


def random_fair(case: Case) -> Outcome:
    """With nodes in random order, each node's devices next to each other in a pipeline."""
    stages, replicas = case.grid()
    seeds = range(case.values.whole("seeds"))
    grids = []
    for seed in seeds:
        order = shuffled_nodes(case.topology, seed)
        grids.append(
            tuple(tuple((order[r * stages + s],) for s in range(stages)) for r in range(replicas))
        )
    return _mean(case, grids)


def single_pipeline(case: Case) -> Outcome:
    """DT-FM's first runs: compute overlaps messages, but each message waits for the one before.

    The next message of a hop starts when the one before has arrived.
    """
    stages, _ = case.grid()
    grid = megatron_grid(list(range(len(case.topology.devices))), 1, stages)
    return _mean(case, [grid], acknowledged=True)


def _mean(case: Case, grids: Sequence[Grid], acknowledged: bool = False) -> Outcome:
    found = [_step(case, grid, acknowledged) for grid in grids]
    breakdown = {key: fmean(f.breakdown[key] for f in found) for key in found[0].breakdown}
    first = found[0]
    return Outcome(breakdown, first.trace, first.sync_s)


def _step(case: Case, grid: Grid, acknowledged: bool) -> Outcome:
    stages, replicas = len(grid[0]), len(grid)
    microbatches = case.microbatches(replicas)
    full, rest = divmod(microbatches, _ROUND)
    rounds = [_ROUND] * full + ([rest] if rest else [])
    cuts = even(case.dims.layers, stages)
    layers = [end - first for first, end in pairwise(cuts)]
    timelines = {n: _round(case, grid, layers, n, acknowledged) for n in set(rounds)}
    length_s = {n: max(t.makespan_s for t in found) for n, found in timelines.items()}
    pipelines_s = sum(length_s[n] for n in rounds)
    compute_s = max(
        sum(case.stage_s(rate, count))
        for chain in grid
        for rate, count in zip(case.rates([d for (d,) in chain]), layers, strict=True)
    )
    sync_s = _sync_s(case, grid, layers)
    compute_s = min(compute_s * microbatches, pipelines_s)
    breakdown = {
        "compute": compute_s,
        "pipeline": pipelines_s - compute_s,
        "gradient_sync": sync_s,
    }
    trace = []
    if case.trace:
        start_s = 0.0
        for n in rounds:
            for chain, timeline in zip(grid, timelines[n], strict=True):
                ids = tuple(case.topology.devices[d].id for (d,) in chain)
                trace.append(TracedPipeline(ids, timeline, start_s))
            start_s += length_s[n]
    return Outcome(breakdown, tuple(trace), (pipelines_s, pipelines_s + sync_s))


def _round(
    case: Case, grid: Grid, layers: Sequence[int], microbatches: int, acknowledged: bool
) -> tuple[Timeline, ...]:
    stages = len(layers)
    if case.values.given.get("schedule") == "1f1b":
        warmup = tuple(min(microbatches, stages - s) for s in range(stages))
        actions = one_f_one_b(warmup, microbatches)
    else:
        actions = gpipe(stages, microbatches)
    flows = SharedFlows(case.table)
    jitter = case.values.number("jitter_percent") or 0
    slower = case.values.number("straggler_percent") or 0
    traffic = case.values.number("traffic_percent") or 0

    def flow(a: int, b: int) -> Flow:
        found = flows.flow(a, b, case.message_bytes)
        if not acknowledged:
            return found
        per_byte = found.seconds_per_byte + found.latency_s / case.message_bytes
        return Flow(0.0, case.message_bytes, per_byte, found.resources)

    work = []
    for r, chain in enumerate(grid):
        devices = [d for (d,) in chain]
        times = [
            case.stage_s(rate, count)
            for rate, count in zip(case.rates(devices), layers, strict=True)
        ]
        work.append(
            PipelineWork(
                actions,
                tuple(forward for forward, _ in times),
                tuple(backward for _, backward in times),
                tuple(flow(a, b) for a, b in pairwise(devices)),
                tuple(flow(b, a) for a, b in pairwise(devices)),
                pace=paces(
                    actions,
                    jitter=jitter / 100,
                    stragglers={0: 1 + slower / 100} if r == 0 else {},
                    seed=r,
                )
                if jitter or slower
                else None,
                blocking_sends=not acknowledged,
                traffic_slowdown=traffic / 100,
            )
        )
    return simulate(work, flows.seconds_per_byte)


def _sync_s(case: Case, grid: Grid, layers: Sequence[int]) -> float:
    if len(grid) == 1:
        return 0.0
    sizes = [float(case.element_bytes * count * layer_parameters(case.dims)) for count in layers]
    sizes[0] += case.element_bytes * embedding_parameters(case.dims)
    in_order = sorted(grid)
    groups = [[chain[s][0] for chain in in_order] for s in range(len(layers))]
    window = case.constants.hardware.collective_window_bytes
    return reduce_and_broadcast_s(case.collectives, groups, sizes, window)
