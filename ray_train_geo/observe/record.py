"""The line that a committed step leaves in ``metrics.jsonl`` (level 0)."""

from __future__ import annotations

import math
from typing import Any

__all__ = ["metrics_record"]


def metrics_record(
    *,
    time: float,
    step: int,
    loss: float,
    grad_norm: float,
    learning_rate: float,
    loss_scale: float,
    skipped: bool,
    step_s: float,
    tokens: int,
    predicted_step_s: float,
    generation: int,
    bytes_per_token: float | None,
) -> dict[str, Any]:
    """One step as plain JSON.

    ``tokens`` are those of this step.  ``bits_per_byte`` is the loss (nats per token) in bits per
    byte of the original text; None where its length is unknown.
    """
    bits_per_byte = loss / math.log(2) / bytes_per_token if bytes_per_token else None
    return {
        "time": time,
        "step": step,
        "loss": loss,
        "tokens": tokens,
        "step_s": step_s,
        "predicted_step_s": predicted_step_s,
        "tokens_per_s": tokens / step_s,
        "grad_norm": grad_norm,
        "lr": learning_rate,
        "generation": generation,
        "bits_per_byte": bits_per_byte,
        "loss_scale": loss_scale,
        "skipped": skipped,
    }
