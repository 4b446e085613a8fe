"""AdamW over fp32 master weights, and the learning rate as a function of the step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from ray_train_geo.spec import TrainingSpec

__all__ = ["MOMENTS", "build_optimizer", "learning_rate", "optimizer_steps", "set_optimizer_steps"]

MOMENTS = ("exp_avg", "exp_avg_sq")
"""What AdamW keeps for each weight, by torch's names."""


def learning_rate(step: int, training: TrainingSpec) -> float:
    """Learning rate of ``step`` (counted from 1): linear warmup, then cosine decay or constant.

    A pure function of the step, so that it is the same after a resume and on every worker.
    """
    if step <= training.warmup_steps:
        return training.lr * step / training.warmup_steps
    if training.lr_schedule == "constant":
        return training.lr
    end = max(training.lr_decay_steps or training.steps, training.warmup_steps + 1)
    progress = min(1.0, (step - training.warmup_steps) / (end - training.warmup_steps))
    return training.min_lr + (training.lr - training.min_lr) * 0.5 * (
        1 + math.cos(math.pi * progress)
    )


def build_optimizer(
    weights: Mapping[str, torch.Tensor],
    training: TrainingSpec,
    moments: Mapping[str, torch.Tensor] | None = None,
) -> torch.optim.AdamW:
    """AdamW over ``weights`` (by name); matrices decay, norms and biases do not.

    The moments are made at once, so that state has the same form before the first step.

    Args:
        moments: to be taken over, by flat name (``exp_avg.NAME``); the others begin at 0.
    """
    decay = [w for w in weights.values() if w.dim() >= 2]
    keep = [w for w in weights.values() if w.dim() < 2]
    optimizer = torch.optim.AdamW(
        [
            {"params": decay, "weight_decay": training.weight_decay},
            {"params": keep, "weight_decay": 0.0},
        ],
        lr=training.lr,
        betas=training.betas,
        eps=training.eps,
        fused=True,
    )
    for name, weight in weights.items():
        state: dict[str, Any] = optimizer.state[weight]
        state["step"] = torch.zeros((), dtype=torch.float32, device=weight.device)
        for moment in MOMENTS:
            taken = (moments or {}).get(f"{moment}.{name}")
            state[moment] = torch.zeros_like(weight) if taken is None else taken
    return optimizer


def optimizer_steps(optimizer: torch.optim.AdamW) -> int:
    """How many updates were applied (steps that overflowed do not count)."""
    return int(next(iter(optimizer.state.values()))["step"])


def set_optimizer_steps(optimizer: torch.optim.AdamW, steps: int) -> None:
    for state in optimizer.state.values():
        state["step"].fill_(steps)
