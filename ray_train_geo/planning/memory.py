"""What a stage needs of a device's memory.

Per parameter, in bytes (mixed precision as in Micikevicius et al., 2018; sums are always fp32):

    ==================  ====  =========
    ..                  fp32  bf16/fp16
    ==================  ====  =========
    weights                4  2, and 4 of fp32 master weights
    gradients              4  4, and 2 as the backward pass makes them
    Adam's two moments     8  8
    snapshot            12 on a CPU: an asynchronous checkpoint copies weights and moments
    residuals           8 where a gradient codec feeds back; 4 more in a snapshot
    copies              48 on a CPU: two in-memory copies of its own state, and two of a peer's;
                        and 12 of residuals: one that leaves, two of a peer's
    delayed sums        8: weights before the newest update, and gradients that are being summed;
                        4 more in a snapshot and in each copy
    local SGD           12: the state before the newest step; and 20 on a CPU: global parameters,
                        outer momentum, and a merge's pseudogradients, messages and means
    ==================  ====  =========

What a GPU's worker has of these only on a CPU is in host memory: it does not count against the
device.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, fields

from ray_train_geo.cluster.topology import Device
from ray_train_geo.model.catalog import (
    BYTES_PER_ELEMENT,
    ModelDims,
    boundary_bytes,
    embedding_activation_bytes,
    embedding_parameters,
    head_activation_bytes,
    head_deferred_bytes,
    head_parameters,
    layer_activation_bytes,
    layer_deferred_bytes,
    layer_parameters,
)
from ray_train_geo.spec import TrainingSpec

__all__ = [
    "CPU_OVERHEAD_BYTES",
    "GPU_OVERHEAD_BYTES",
    "OUTER_STATE_BYTES_PER_PARAMETER",
    "MemoryEstimate",
    "is_cpu",
    "largest",
    "stage_memory_bytes",
    "stage_parameters",
]

STATE_BYTES_PER_PARAMETER = 12
"""What a layer's state is: fp32 weights (master copies, at a lower precision) and two moments."""

_RESIDUAL_BYTES = 8
"""What error feedback keeps for each parameter: the residual, and the one after the next step."""

_BEHIND_BYTES = 4
"""With delayed sums, of each parameter: its value before the newest update."""

CPU_OVERHEAD_BYTES = 300_000_000
"""A worker process with torch and Ray loaded and no model (measured: 180 MB PSS, plus buffers)."""

GPU_OVERHEAD_BYTES = 1_500_000_000
"""CUDA context, cuBLAS workspace, NCCL buffers and the allocator's fragmentation."""

_MEMORY_COPIES = 4
"""States that a worker keeps: its own of two steps, for the newest may still be on its way to the
peer, and as many of a peer's, which are taken to be as large (``training.copies``)."""

OUTER_STATE_BYTES_PER_PARAMETER = 8
"""Under local SGD, in host memory besides: the global parameters and their momentum."""

_MERGE_BYTES_PER_PARAMETER = 12
"""While everything is merged at once: pseudogradients, messages, means."""

_CHANNEL_SENDS = 8
"""Sends that a channel between stages lets be under way (``limit`` of training.channel.Sender)."""


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Peak memory of one stage; all fields are in bytes."""

    parameters: int
    gradients: int
    optimizer: int
    snapshot: int
    copies: int
    delayed: int
    local_sgd: int
    activations: int
    messages: int
    overhead: int

    @property
    def total(self) -> int:
        return sum(getattr(self, f.name) for f in fields(self))

    def describe(self) -> str:
        """Such as ``5.21 GB = parameters 1.30 + gradients 1.30 + ...`` (parts in GB)."""
        parts = [f"{f.name} {getattr(self, f.name) / 1e9:.2f}" for f in fields(self)]
        return f"{self.total / 1e9:.2f} GB = {' + '.join(parts)}"


def is_cpu(device: Device) -> bool:
    """Whether ``device`` computes on host memory (its ``type`` begins with "cpu")."""
    return device.type.lower().startswith("cpu")


def stage_parameters(dims: ModelDims, layers: tuple[int, int]) -> int:
    """Parameters held by the stage of ``layers`` (first, last exclusive).

    The embedding is with layer 0, the head with the last layer; a tied token matrix is held a
    second time where first and last layer are on different stages.
    """
    first, last = layers[0] == 0, layers[1] == dims.layers
    count = (layers[1] - layers[0]) * layer_parameters(dims)
    if first:
        count += embedding_parameters(dims)
    if last:
        count += head_parameters(dims)
        if dims.tied_embeddings and not first:
            count += dims.vocab_size * dims.dim
    return count


def stage_memory_bytes(
    dims: ModelDims,
    training: TrainingSpec,
    layers: tuple[int, int],
    in_flight: int,
    *,
    cpu: bool,
    deferred: int = 0,
    sync_bucket_bytes: int = 0,
    feeds_back: bool = False,
    memory_copies: bool = False,
    local_sgd: bool = False,
    delayed: bool = False,
) -> MemoryEstimate:
    """Peak memory of the stage of ``layers`` (first, last exclusive).

    Args:
        in_flight: microbatches whose activations are held at once (1F1B: warmup + 1).
        cpu: the device's memory is host memory.
        deferred: microbatches whose weight gradients are still to be computed, at once
            (zero-bubble: the stage's ``deferred`` and the one whose backward has just ended).
        sync_bucket_bytes: largest message of the gradient sync; 0 where there is none.
        feeds_back: gradients are summed by a codec with error feedback.
        memory_copies: workers keep copies of the state, of their own and of peers on other nodes.
        local_sgd: pipelines step alone.
        delayed: sums come a step later.

    Activations are those of ``in_flight`` microbatches, and the working set of one backward: one
    layer's activations once more (recomputed, or as gradients) and the gradient of the logits.
    What a deferred one holds is input and output gradient of each matrix, and on a first stage the
    embedding's gradient.
    Messages, for each neighbour: sends under way (``in_flight``, and at least the 8 that a channel
    allows), receives posted ahead (``in_flight`` + 1), and the one in use; outputs kept for their
    backward; two buckets of the gradient sync.
    """
    first, last = layers[0] == 0, layers[1] == dims.layers
    seq_len, microbatch, precision = training.seq_len, training.microbatch, training.precision
    parameters = stage_parameters(dims, layers)
    fp32 = precision == "fp32"

    kept = (layers[1] - layers[0]) * layer_activation_bytes(
        dims, seq_len, microbatch, precision, training.recompute
    )
    working = layer_activation_bytes(dims, seq_len, microbatch, precision, False)
    if first:
        kept += embedding_activation_bytes(dims, seq_len, microbatch, precision)
    if last:
        head = head_activation_bytes(dims, seq_len, microbatch, precision)
        kept += head
        working += head

    later = (layers[1] - layers[0]) * layer_deferred_bytes(dims, seq_len, microbatch, precision)
    if first:
        later += embedding_parameters(dims) * BYTES_PER_ELEMENT[precision]
    if last:
        later += head_deferred_bytes(dims, seq_len, microbatch, precision)

    queued = ((not first) + (not last)) * (max(in_flight, _CHANNEL_SENDS) + in_flight + 2)
    outputs = 0 if last else in_flight
    state = STATE_BYTES_PER_PARAMETER + _BEHIND_BYTES * delayed
    copied = state * _MEMORY_COPIES + 3 * (_RESIDUAL_BYTES // 2) * feeds_back
    snapshot = state + (_RESIDUAL_BYTES // 2 if feeds_back else 0)
    message = boundary_bytes(dims, seq_len, microbatch, precision)
    outer = OUTER_STATE_BYTES_PER_PARAMETER + _MERGE_BYTES_PER_PARAMETER
    messages = (queued + outputs) * message + 2 * min(sync_bucket_bytes, 4 * parameters)
    return MemoryEstimate(
        parameters=parameters * (4 if fp32 else 6),
        gradients=parameters * ((4 if fp32 else 6) + (_RESIDUAL_BYTES if feeds_back else 0)),
        optimizer=parameters * 8,
        snapshot=parameters * snapshot if cpu else 0,
        copies=parameters * copied * (cpu and memory_copies),
        delayed=parameters * 2 * _BEHIND_BYTES * delayed,
        local_sgd=parameters * (STATE_BYTES_PER_PARAMETER + outer * cpu) * local_sgd,
        activations=in_flight * kept + working + deferred * later,
        messages=messages,
        overhead=CPU_OVERHEAD_BYTES if cpu else GPU_OVERHEAD_BYTES,
    )


def largest(needs_bytes: Callable[[int], int], limit_bytes: int, most: int) -> int:
    """The largest ``n`` in 1..``most`` with ``needs_bytes(n) <= limit_bytes``; 0 if there is none.

    ``needs_bytes`` must not decrease.
    """
    return bisect_left(range(1, most + 1), True, key=lambda n: needs_bytes(n) > limit_bytes)
