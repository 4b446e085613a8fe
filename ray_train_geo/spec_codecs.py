"""The job spec's section on codecs: what may be rounded on the wire, and how."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ray_train_geo.spec_base import Section

__all__ = ["CodecSpec"]

_AUTO = ("none", "bf16", "int8")


class CodecSpec(Section):
    """What messages are made smaller with. Codecs round: they trade exactness for bytes."""

    activations: Literal["none", "bf16", "int8", "int4", "auto"] = Field(
        "none",
        description="On activations and their gradients between stages: one codec on every hop, "
        "or auto (for each link the planner's choice of none, bf16 and int8: as little as lets "
        "the link keep up). int8 and int4 round groups of 128 values stochastically.",
    )
    rotation: bool = Field(
        False,
        description="int8 and int4 on activations: rotate each group by a Hadamard matrix first, "
        "which spreads outliers. Four times the computation; it pays with int4.",
    )

    gradients: Literal["none", "bf16", "int8", "topk", "powersgd"] = Field(
        "none",
        description="On gradients that pipelines sum, with any gradient_sync but allreduce "
        "(powersgd: sharded_ps or central_ps; auto is one that fits). bf16; int8, with a scale for "
        "128 values; topk, the largest of a random part in 4 bits (as CocktailSGD); powersgd, a "
        "product of two thin matrices. What topk and powersgd leave out is fed back later.",
    )
    topk_stride: int = Field(
        4, ge=1, le=256, description="topk looks at one value of so many, others each step."
    )
    topk_fraction: float = Field(
        0.2, gt=0, le=1, description="topk keeps this part of what it looks at."
    )
    powersgd_rank: int = Field(4, ge=1, description="Columns of powersgd's thin matrices.")

    @property
    def feeds_back(self) -> bool:
        """Whether the codec on gradients keeps what it leaves out."""
        return self.gradients in ("topk", "powersgd")

    @property
    def of_hops(self) -> tuple[str, ...]:
        """The codecs that a hop of a plan may use."""
        return _AUTO if self.activations == "auto" else (self.activations,)
