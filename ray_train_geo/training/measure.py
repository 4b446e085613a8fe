"""How fast a device is on this job's layers: measured, as data sheets and peaks mislead."""

from __future__ import annotations

import dataclasses
import time

import torch

from ray_train_geo.model.catalog import ModelDims, layer_flops
from ray_train_geo.model.dropout import dropout_key
from ray_train_geo.model.stage import build_stage
from ray_train_geo.spec import TrainingSpec
from ray_train_geo.training.precision import DTYPES

__all__ = ["device_memory_bytes", "sustained_flops_per_s"]

_BACKWARD_PER_FORWARD = 2.0


def sustained_flops_per_s(
    dims: ModelDims, training: TrainingSpec, device: torch.device, budget_s: float = 0.4
) -> float:
    """FLOP/s of one layer's forward and backward at the job's microbatch and precision.

    Counted as model FLOPs (backward = 2 forwards, nothing for recomputation).  The first pass is
    a warm-up; then passes run until ``budget_s`` seconds are over, at least two.
    """
    # A layer in the middle: neither embedding nor head.
    middle = build_stage(dataclasses.replace(dims, layers=3), 1, 2, seed=0, device=str(device))
    middle.to(DTYPES[training.precision])
    shape = (training.microbatch, training.seq_len, dims.dim)
    x = torch.randn(shape, device=device, dtype=DTYPES[training.precision], requires_grad=True)
    gradient, key = torch.randn_like(x), dropout_key(0, 1, 0)

    def once() -> None:
        middle(x, key).backward(gradient)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    once()
    passes, start_s = 0, time.perf_counter()
    while passes < 2 or time.perf_counter() - start_s < budget_s:
        once()
        passes += 1
    seconds = (time.perf_counter() - start_s) / passes
    forward = layer_flops(dims, training.seq_len, training.microbatch)
    return (1 + _BACKWARD_PER_FORWARD) * forward / seconds


def device_memory_bytes(device: torch.device) -> int | None:
    """Memory of a GPU in bytes; None for a CPU, which its node's workers share."""
    if device.type != "cuda":
        return None
    return int(torch.cuda.get_device_properties(device).total_memory)
