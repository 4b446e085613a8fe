"""What one device, and the whole cluster, take for their parts of a step.

Hops are `planning.warmup` and `planning.pipeline_cost`, gradient sync is `planning.sync_cost`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ray_train_geo.cluster.topology import Device
from ray_train_geo.model.catalog import (
    ModelDims,
    boundary_bytes,
    head_flops,
    layer_flops,
    layer_weight_flops,
    step_flops,
)
from ray_train_geo.planning.link_table import Floats, Ints, LinkTable
from ray_train_geo.planning.memory import is_cpu
from ray_train_geo.spec import TrainingSpec

__all__ = [
    "StageWork",
    "backward_s",
    "committed_s",
    "embedding_s",
    "forward_s",
    "head_s",
    "layer_s",
    "layer_weight_s",
    "lower_bound_s",
    "memory_bytes_per_s",
    "optimizer_s",
    "weight_s",
]

_CPU_MEMORY_BYTES_PER_S = 1e10
_GPU_MEMORY_BYTES_PER_S = 1e12
_OPTIMIZER_BYTES_PER_PARAMETER = 28  # fp32: read weight, gradient, 2 moments; write all but grad


def memory_bytes_per_s(device: Device) -> float:
    """How fast ``device`` reads or writes its memory: what bounds lookups, codecs, optimizers."""
    return _CPU_MEMORY_BYTES_PER_S if is_cpu(device) else _GPU_MEMORY_BYTES_PER_S


def layer_s(dims: ModelDims, training: TrainingSpec, device: Device) -> tuple[float, float]:
    """Forward and backward of one microbatch through one layer, in seconds.

    A backward is two forwards, and one more of what is recomputed.
    """
    forward = layer_flops(dims, training.seq_len, training.microbatch) / device.flops_per_s
    return forward, (3 if training.recompute else 2) * forward


def layer_weight_s(dims: ModelDims, training: TrainingSpec, device: Device) -> float:
    """The part of a layer's backward that computes gradients of weights, in seconds."""
    return layer_weight_flops(dims, training.seq_len, training.microbatch) / device.flops_per_s


def embedding_s(dims: ModelDims, training: TrainingSpec, device: Device) -> tuple[float, float]:
    """Looking tokens up, and adding to their gradients: read and write a hidden state or two."""
    size = boundary_bytes(dims, training.seq_len, training.microbatch, training.precision)
    forward = 2 * size / memory_bytes_per_s(device)
    return forward, 2 * forward


def head_s(dims: ModelDims, training: TrainingSpec, device: Device) -> tuple[float, float]:
    """Forward and backward of the output head on one microbatch; it is never recomputed."""
    forward = head_flops(dims, training.seq_len, training.microbatch) / device.flops_per_s
    return forward, 2 * forward


def _stage_s(
    dims: ModelDims, training: TrainingSpec, layers: tuple[int, int], device: Device, way: int
) -> float:
    seconds = (layers[1] - layers[0]) * layer_s(dims, training, device)[way]
    if layers[0] == 0:
        seconds += embedding_s(dims, training, device)[way]
    if layers[1] == dims.layers:
        seconds += head_s(dims, training, device)[way]
    return seconds


def forward_s(
    dims: ModelDims, training: TrainingSpec, layers: tuple[int, int], device: Device
) -> float:
    """Forward of one microbatch on the stage of ``layers`` (first, last exclusive), in seconds."""
    return _stage_s(dims, training, layers, device, 0)


def backward_s(
    dims: ModelDims, training: TrainingSpec, layers: tuple[int, int], device: Device
) -> float:
    """Backward of one microbatch on the stage of ``layers``, in seconds."""
    return _stage_s(dims, training, layers, device, 1)


def weight_s(
    dims: ModelDims, training: TrainingSpec, layers: tuple[int, int], device: Device
) -> float:
    """The part of :func:`backward_s` that computes gradients of matrices (W), in seconds.

    Other weights' gradients take next to no time; the embedding's come with those of its output.
    """
    seconds = (layers[1] - layers[0]) * layer_weight_s(dims, training, device)
    if layers[1] == dims.layers:
        seconds += head_s(dims, training, device)[0]
    return seconds


@dataclass(frozen=True, slots=True)
class StageWork:
    """Seconds of one microbatch on each device: a stage is so many layers, and perhaps the ends.

    All are ``[devices]``: forward and backward of one layer, of the embedding, of the head; and the
    part of a layer's backward that is W.  The head's W is as long as its forward.
    """

    layer: tuple[tuple[float, float], ...]
    embedding: tuple[tuple[float, float], ...]
    head: tuple[tuple[float, float], ...]
    layer_weights: tuple[float, ...]

    @classmethod
    def of(cls, dims: ModelDims, training: TrainingSpec, devices: Sequence[Device]) -> StageWork:
        return cls(
            tuple(layer_s(dims, training, d) for d in devices),
            tuple(embedding_s(dims, training, d) for d in devices),
            tuple(head_s(dims, training, d) for d in devices),
            tuple(layer_weight_s(dims, training, d) for d in devices),
        )


def optimizer_s(parameters: int, device: Device) -> float:
    """One AdamW update, in seconds: bound by memory, 28 bytes moved per parameter."""
    return _OPTIMIZER_BYTES_PER_PARAMETER * parameters / memory_bytes_per_s(device)


def committed_s(updated_s: Floats, workers: Ints, firsts: Ints, table: LinkTable) -> float:
    """When a step is committed everywhere: the last worker's sums are at rank 0, and it has spoken.

    A pipeline begins a step when rank 0's word on the one before has reached its first stage, and
    a worker is done when its own sums have reached rank 0: so pipelines near rank 0 lose nothing.

    Args:
        updated_s: ``[ranks]``; since the beginning of the worker's own pipeline.
        workers: ``[ranks]``; device numbers.
        firsts: ``[ranks]``; of the first stage of each worker's pipeline.
    """
    root = workers[:1]
    word_s = np.where(firsts == root, 0.0, table.hops(root, firsts)[0])
    sums_s = np.where(workers == root, 0.0, table.hops(workers, root)[0])
    return float((word_s + updated_s + sums_s).max())


def lower_bound_s(dims: ModelDims, training: TrainingSpec, devices: Sequence[Device]) -> float:
    """No plan on ``devices`` is faster: all of a step's FLOPs at all of their FLOP/s.

    In seconds; there must be at least one device.
    """
    flops = step_flops(dims, training.seq_len, training.global_batch, training.recompute)
    return flops / sum(d.flops_per_s for d in devices)
