"""Top-k of a sample, in 4 bits: for gradients whose rest is fed back.

As CocktailSGD (Wang et al., ICML 2023): a random part of the values is looked at, the largest of
them are kept, and those are rounded to 4 bits.  Here the random part is every ``stride``-th value
from a random first one, and the largest are taken in each block of 256 looked at, so that places
are bytes and messages have one size::

    values    x0 x1 x2 x3 x4 x5 x6 x7 x8 ...       stride 4, first 2:  x2 x6 ...
    wire      | scales, bf16, one a block | places, 1 B each | values, two a byte |
"""

from __future__ import annotations

import torch
from torch import Tensor

from ray_train_geo.codecs.base import SAMPLES
from ray_train_geo.codecs.groupwise import pack, scales_of, unpack
from ray_train_geo.codecs.workspace import Workspace
from ray_train_geo.planning.codecs import SCALE_BYTES, SPARSE_BLOCK, sparse_kept, sparse_wire_bytes

__all__ = ["SparseCodec"]

_LEVELS = 7


class SparseCodec:
    """See :class:`~ray_train_geo.codecs.base.Codec`; what is not kept is decoded as 0.

    Args:
        stride: one value of so many is looked at; up to 256.
        fraction: of those, the part that is kept.
    """

    def __init__(self, elements: int, workspace: Workspace, stride: int, fraction: float) -> None:
        self.wire_bytes = sparse_wire_bytes(elements, stride, fraction)
        self._elements = elements
        self._workspace = workspace
        self._stride = stride
        self._kept = sparse_kept(fraction)
        self._blocks = -(-elements // (stride * SPARSE_BLOCK))

    def _on_wire(self, wire: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Scales ``[blocks]``, places ``[blocks, kept]`` and values ``[blocks, kept / 2]``."""
        chosen = self._blocks * self._kept
        scales, places, values = wire.split([self._blocks * SCALE_BYTES, chosen, chosen // 2])
        return (
            scales.view(torch.bfloat16),
            places.view(self._blocks, -1),
            values.view(torch.int8).view(self._blocks, -1),
        )

    def encode(self, values: Tensor, wire: Tensor, key: int) -> None:
        looked_at = self._looked_at(values, key)
        sample = torch.zeros(self._blocks * SPARSE_BLOCK, device=values.device)
        sample[: len(looked_at)] = looked_at
        sample = sample.view(self._blocks, -1)
        places = torch.topk(sample.abs(), self._kept, dim=1, sorted=False).indices
        chosen = sample.gather(1, places)
        scale = scales_of(chosen.abs().amax(1), _LEVELS)
        noise = self._noise(key).view_as(chosen)
        chosen = torch.addcmul(noise, chosen, (1 / scale).unsqueeze(1)).floor_()
        on_wire = self._on_wire(wire)
        for target, found in zip(on_wire, (scale, places, pack(chosen)), strict=True):
            target.copy_(found)

    def _looked_at(self, values: Tensor, key: int) -> Tensor:
        first = key % SAMPLES % min(self._stride, self._elements)
        return values.view(-1)[first :: self._stride]

    def _noise(self, key: int) -> Tensor:
        size, part = self._blocks * self._kept, self._workspace.part
        parts = [
            self._workspace.noise(key, i, min(part, size - start))
            for i, start in enumerate(range(0, size, part))
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def decode(self, wire: Tensor, values: Tensor, key: int) -> None:
        scales, places, packed = self._on_wire(wire)
        chosen = torch.empty(places.shape, device=wire.device)
        unpack(packed, chosen)
        chosen.mul_(scales.float().unsqueeze(1))
        sample = torch.zeros(self._blocks, SPARSE_BLOCK, device=wire.device)
        sample.scatter_(1, places.long(), chosen)
        looked_at = self._looked_at(values.zero_(), key)
        looked_at.copy_(sample.view(-1)[: len(looked_at)])
