"""PyTorch Pipe and Fairscale's: GPipe inside one process, over the GPUs of one instance.

All microbatches at once, forwards first; messages go over NVLink (between instances, if a replica
spans some, over their link) and overlap compute.  With several
replicas (Fairscale: fully sharded data parallelism around it) gradients are summed around a ring,
and the parameters of a stage are gathered before its forward and its backward.
"""

from __future__ import annotations

from itertools import pairwise

from ray_train_geo.model.catalog import embedding_parameters, layer_parameters
from ray_train_geo.planning.partition import even
from ray_train_geo.schedule.gpipe import gpipe
from ray_train_geo.schedule.timeline import Hop, timeline
from ray_train_geo.systems.case import Case, Outcome
from ray_train_geo.systems.collectives import all_reduce_s
from ray_train_geo.systems.simulated import TracedPipeline

__all__ = ["fairscale", "pipe"]


def pipe(case: Case) -> Outcome:
    """Plain data parallelism between replicas."""
    return _step(case, gathers=0)


def fairscale(case: Case) -> Outcome:
    """Fully sharded data parallelism between replicas."""
    return _step(case, gathers=1)


def _step(case: Case, gathers: int) -> Outcome:
    stages, replicas = case.grid()
    microbatches = case.microbatches(replicas)
    factor = case.constants.pytorch_pipe.compute_factor
    layers = [end - first for first, end in pairwise(even(case.dims.layers, stages))]
    # A replica's stages are next to each other: on one instance, if it has so many GPUs.
    grid = [list(range(r * stages, (r + 1) * stages)) for r in range(replicas)]
    times = [
        case.stage_s(rate * factor, count)
        for rate, count in zip(case.rates(grid[0]), layers, strict=True)
    ]
    found = max(
        (
            timeline(
                gpipe(stages, microbatches),
                [f for f, _ in times],
                [b for _, b in times],
                [_hop(case, a, b) for a, b in pairwise(chain)],
                [_hop(case, b, a) for a, b in pairwise(chain)],
            )
            for chain in grid
        ),
        key=lambda t: t.makespan_s,
    )
    compute_s = microbatches * max(f + b for f, b in times)
    sizes = [float(case.element_bytes * count * layer_parameters(case.dims)) for count in layers]
    sizes[0] += case.element_bytes * embedding_parameters(case.dims)
    groups = [[chain[s] for chain in grid] for s in range(stages)]
    sync_s = all_reduce_s(case.collectives, groups, sizes) if replicas > 1 else 0.0
    breakdown = {
        "compute": compute_s,
        "pipeline": found.makespan_s - compute_s,
        "gradient_sync": sync_s,
    }
    if gathers:
        # A gather is half of an all-reduce; one before the forward, one before the backward.
        breakdown["parameter_gather"] = gathers * sync_s
    ids = tuple(case.topology.devices[d].id for d in grid[0])
    trace = (TracedPipeline(ids, found),) if case.trace else ()
    return Outcome(breakdown, trace, (found.makespan_s, found.makespan_s + sync_s))


def _hop(case: Case, a: int, b: int) -> Hop:
    if case.table.node[a] == case.table.node[b]:
        return Hop(0.0, case.message_bytes / (case.constants.hardware.nvlink_gbytes_per_s * 1e9))
    latency, per_byte = case.table.hop(a, b)
    return Hop(latency, case.message_bytes * per_byte)
