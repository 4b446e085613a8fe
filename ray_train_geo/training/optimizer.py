"""AdamW over fp32 master weights, and the learning rate as a function of the step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch.optim.adamw import adamw

from ray_train_geo.spec import TrainingSpec

__all__ = ["MOMENTS", "AdamW", "learning_rate"]

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


class AdamW:
    """AdamW over ``weights`` (fp32, by name); matrices decay, norms and biases do not.

    It is torch's, by its functional form: the class ``torch.optim.AdamW`` imports torch's compiler,
    which is a third of what a worker on a new node has to load before it computes.  The moments
    are made at once, so that state has the same form before the first step.

    Args:
        moments: to be taken over, by flat name (``exp_avg.NAME``); the others begin at 0.
    """

    def __init__(
        self,
        weights: Mapping[str, torch.Tensor],
        training: TrainingSpec,
        moments: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        self._weights = dict(weights)
        self._training = training
        self.moments = {
            moment: {
                name: torch.zeros_like(weight) if taken is None else taken
                for name, weight in self._weights.items()
                for taken in [(moments or {}).get(f"{moment}.{name}")]
            }
            for moment in MOMENTS
        }
        # The kernel counts each weight's updates where the weight is.
        self._steps = {
            name: torch.zeros((), dtype=torch.float32, device=weight.device)
            for name, weight in self._weights.items()
        }

    @property
    def updates(self) -> int:
        """How many updates were applied (steps that overflowed do not count)."""
        return int(next(iter(self._steps.values())))

    @updates.setter
    def updates(self, number: int) -> None:
        for steps in self._steps.values():
            steps.fill_(number)

    @torch.no_grad()
    def step(self, lr: float, factor: float = 1.0) -> None:
        """One update with the weights' gradients times ``factor``; without a gradient, none."""
        there = [name for name, weight in self._weights.items() if weight.grad is not None]
        decaying = [name for name in there if self._weights[name].dim() >= 2]
        keeping = [name for name in there if self._weights[name].dim() < 2]
        for names, decay in ((decaying, self._training.weight_decay), (keeping, 0.0)):
            if names:
                self._update(names, lr, decay, factor)

    def _update(self, names: Sequence[str], lr: float, decay: float, factor: float) -> None:
        weights = [self._weights[name] for name in names]
        gradients = [grad for weight in weights if (grad := weight.grad) is not None]
        # The fused kernel divides by this as it reads the gradients: no pass of their own.
        scale = None if factor == 1.0 else torch.tensor(1.0 / factor, device=weights[0].device)
        first, second = ([self.moments[moment][name] for name in names] for moment in MOMENTS)
        adamw(
            weights,
            gradients,
            first,
            second,
            [],
            [self._steps[name] for name in names],
            fused=True,
            grad_scale=scale,
            amsgrad=False,
            beta1=self._training.betas[0],
            beta2=self._training.betas[1],
            lr=lr,
            weight_decay=decay,
            eps=self._training.eps,
            maximize=False,
        )
