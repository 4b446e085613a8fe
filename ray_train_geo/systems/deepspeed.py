"""DeepSpeed's pipeline engine (Rasley et al., KDD 2020) with ZeRO-1 or plain data parallelism.

1F1B; a hop's messages, down and up, go one at a time, so that a microbatch takes the longest of a
stage's compute and any hop's two messages.  Gradients are summed in fp32.
"""

from __future__ import annotations

from itertools import pairwise

from ray_train_geo.model.catalog import embedding_parameters, layer_parameters
from ray_train_geo.planning.partition import even
from ray_train_geo.systems.case import Case, Outcome
from ray_train_geo.systems.collectives import all_reduce_s
from ray_train_geo.systems.layouts import megatron_grid
from ray_train_geo.systems.shares import equal_shares

__all__ = ["pipeline"]

_GRADIENT_BYTES = 4


def pipeline(case: Case) -> Outcome:
    """Its default placement: a stage's replicas next to each other."""
    stages, replicas = case.grid()
    figures = case.constants.deepspeed_pipeline
    grid = megatron_grid(list(range(len(case.topology.devices))), 1, stages)
    microbatches = case.microbatches(replicas)
    layers = [end - first for first, end in pairwise(even(case.dims.layers, stages))]
    hops = [pair for chain in grid for pair in pairwise(d for (d,) in chain)]
    rates = equal_shares(case.table, hops, figures.shared_nic_factor)
    slot_s = fill_s = compute_s = 0.0
    for p, chain in enumerate(grid):
        work = [
            sum(case.stage_s(rate * figures.compute_factor, count))
            for rate, count in zip(case.rates([d for (d,) in chain]), layers, strict=True)
        ]
        mine = rates[p * (stages - 1) : (p + 1) * (stages - 1)]
        messages = [figures.transfer_factor * case.message_bytes * r.per_byte for r in mine]
        compute_s = max(compute_s, microbatches * max(work))
        slot_s = max(slot_s, *work, *(2 * m for m in messages))
        fill_s = max(
            fill_s,
            sum(work)
            - max(work)
            + sum(2 * (m + rate.latency_s) for m, rate in zip(messages, mine, strict=True)),
        )
    pipeline_s = microbatches * slot_s + fill_s
    groups = [[chain[s][0] for chain in grid] for s in range(stages)]
    sizes = [float(_GRADIENT_BYTES * count * layer_parameters(case.dims)) for count in layers]
    for end in {0, stages - 1}:
        sizes[end] += _GRADIENT_BYTES * embedding_parameters(case.dims)
    sync_s = all_reduce_s(case.collectives, groups, sizes)
    return Outcome(
        {"compute": compute_s, "pipeline": pipeline_s - compute_s, "gradient_sync": sync_s}
    )
