"""What a stage does in a step, as data (level 0): a schedule is a list of these per stage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["Action", "Kind"]

Kind = Literal["F", "B", "W"]
"""F: forward of one microbatch. B: its backward; in a schedule with W, input gradients alone.
W: its weight gradients."""


@dataclass(frozen=True, slots=True)
class Action:
    """Run ``kind`` on ``microbatch`` (counted from 0 within the pipeline's own microbatches)."""

    kind: Kind
    microbatch: int

    def __str__(self) -> str:
        return f"{self.kind}{self.microbatch}"
