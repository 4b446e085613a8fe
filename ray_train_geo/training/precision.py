"""Precision of weights and activations, and the dynamic loss scale of fp16."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ray_train_geo.spec import LossScaleSpec, Precision

__all__ = ["DTYPES", "LossScale"]

DTYPES: dict[Precision, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


@dataclass(frozen=True, slots=True)
class LossScale:
    """The factor on the loss that keeps small fp16 gradients from vanishing.

    A value, so that all workers compute the next one from the same step's outcome; it moves with
    the state of a layer and into checkpoints.

    Args:
        factor: multiplies the loss before backward; 1 for fp32 and bf16.
        good_steps: steps without overflow since the factor last changed.
    """

    factor: float = 1.0
    good_steps: int = 0

    @classmethod
    def start(cls, precision: Precision, spec: LossScaleSpec) -> LossScale:
        return cls(spec.initial if precision == "fp16" else 1.0)

    def after(self, overflow: bool, precision: Precision, spec: LossScaleSpec) -> LossScale:
        """The scale of the next step (Micikevicius et al., 2018, section 3.2)."""
        if precision != "fp16":
            return self
        if overflow:
            return LossScale(self.factor * spec.backoff_factor)
        if self.good_steps + 1 >= spec.growth_interval:
            return LossScale(self.factor * spec.growth_factor)
        return LossScale(self.factor, self.good_steps + 1)
