"""bf16: the upper half of each fp32 value, rounded to the nearest; for any floating point."""

from __future__ import annotations

import torch
from torch import Tensor

from ray_train_geo.planning.codecs import wire_bytes

__all__ = ["Bf16Codec"]


class Bf16Codec:
    """See :class:`~ray_train_geo.codecs.base.Codec`.  Relative error at most 2^-8."""

    def __init__(self, elements: int) -> None:
        self.wire_bytes = wire_bytes("bf16", elements, "fp32")

    def encode(self, values: Tensor, wire: Tensor, key: int) -> None:
        wire.view(torch.bfloat16).copy_(values.view(-1))

    def decode(self, wire: Tensor, values: Tensor, key: int) -> None:
        values.view(-1).copy_(wire.view(torch.bfloat16))
