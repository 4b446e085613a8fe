"""The job spec's section on local SGD: who steps alone for how long, and how steps are merged."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from ray_train_geo.planning.codecs import CodecName
from ray_train_geo.spec_base import Section

__all__ = ["Across", "LocalSGDSpec"]

Across = Literal["pipelines", "regions"]


class LocalSGDSpec(Section):
    """DiLoCo: islands step alone, and every `inner_steps` steps merge what they have learned.

    Links between islands then carry one pseudogradient in `inner_steps` steps instead of a
    gradient in each. What is computed depends on how many islands there are.
    """

    across: Across = Field(
        "pipelines",
        description="What is an island: each pipeline, or all pipelines of the same regions, "
        "which then sum their gradients in every step as without local SGD.",
    )
    inner_steps: int = Field(
        50, ge=1, description="Steps of AdamW between two merges of a layer, in steps."
    )
    fragments: int = Field(
        1,
        ge=1,
        description="Streaming DiLoCo: layers are dealt out to so many fragments (layer i to "
        "fragment i mod fragments), which are merged at different steps, evenly spread.",
    )
    delay_steps: int = Field(
        0,
        ge=0,
        description="Steps that islands go on while a merge is on the wire. 0 waits for it.",
    )
    mix: float = Field(
        0.5,
        ge=0,
        lt=1,
        description="With delay_steps: how much of its own parameters an island keeps when the "
        "merged ones arrive; the rest is theirs.",
    )
    carry: bool = Field(
        False,
        description="With delay_steps: merged parameters get what the island has learned since it "
        "sent, so that none of its steps is lost; set mix to 0 with it.",
    )
    outer_lr: float = Field(
        0.7, gt=0, description="Learning rate of the outer optimizer (SGD with Nesterov momentum)."
    )
    outer_momentum: float = Field(0.9, ge=0, lt=1, description="Its momentum.")

    codec: CodecName = Field(
        "none",
        description="Of pseudogradients on the wire: none (fp32), bf16, int8 or int4 (groups of "
        "values share a scale, and are rounded stochastically).",
    )

    @model_validator(mode="after")
    def _round(self) -> LocalSGDSpec:
        if self.fragments > self.inner_steps:
            raise ValueError(
                f"fragments ({self.fragments}) is more than inner_steps ({self.inner_steps}); each "
                "fragment is merged at a step of its own"
            )
        if self.delay_steps >= self.inner_steps:
            raise ValueError(
                f"delay_steps ({self.delay_steps}) must be less than inner_steps "
                f"({self.inner_steps}): a fragment's merge ends before its next one begins"
            )
        return self
