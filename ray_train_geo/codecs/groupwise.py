"""int8 and int4: groups of 128 values share a scale, and are rounded up or down at random.

    wire      | scales, bf16: 2 B a group | values: 1 B each, or two a byte |

With ``L`` = 127 or 7 levels on each side and ``s`` = max|x| / L (rounded up to bf16), a value
becomes ``q = floor(x / s + u)``, ``u`` random in [0, 1): the error is below ``s``, and zero on
average (Gupta et al., 2015).  A rotated group is multiplied by a Hadamard matrix first, which
spreads an outlier over its group (TAH-Quant, 2025): its error is bounded in the L2 norm then.

Two 4-bit values ``a, b`` of -7..7 travel as the byte ``a + 16 b``: ``b`` is that byte / 16,
rounded.  ``a`` is from the first half of a group and ``b`` from the second: no pass has gaps.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ray_train_geo.codecs.workspace import Workspace
from ray_train_geo.planning.codecs import GROUP, SCALE_BYTES, CodecName, wire_bytes

__all__ = ["GroupwiseCodec", "pack", "scales_of", "unpack"]

_LEVELS: dict[CodecName, int] = {"int8": 127, "int4": 7}
_NIBBLE = 16.0
_ROOM = 1 + 2.0**-12
"""Scales are so much larger than they must be: rounding in fp32 never passes the last level."""
_SMALLEST_SCALE = 2.0**-126
"""The smallest normal fp32: its inverse is finite; what lies below is rounded to 0 or to it."""
_NAN_BITS, _BF16_ROUND_UP, _BF16_MASK, _SIGN_OFF = 0x7FC00000, 0xFFFF, ~0xFFFF, 0x7FFFFFFF


class _Part(NamedTuple):
    """``rows`` groups of ``width`` values, the last ``padding`` of which are not the tensor's."""

    number: int
    first_value: int
    first_byte: int
    first_group: int
    rows: int
    width: int
    padding: int


class GroupwiseCodec:
    """See :class:`~ray_train_geo.codecs.base.Codec`.

    Args:
        rotated: whole groups are rotated; a last one that is smaller is not.
    """

    def __init__(
        self, name: CodecName, elements: int, workspace: Workspace, rotated: bool = False
    ) -> None:
        self.wire_bytes = wire_bytes(name, elements, "fp32")
        self._levels = _LEVELS[name]
        self._packed = name == "int4"
        self._elements = elements
        self._workspace = workspace
        self._rotated = rotated
        self._scale_bytes = -(-elements // GROUP) * SCALE_BYTES
        self._parts = list(self._split())

    def _split(self) -> Iterator[_Part]:
        """Whole groups, so many at a time as there is room for, and the rest."""
        per_byte = 2 if self._packed else 1
        whole = self._elements // GROUP * GROUP
        number = 0
        for first in range(0, whole, self._workspace.part):
            rows = min(self._workspace.part, whole - first) // GROUP
            yield _Part(number, first, first // per_byte, first // GROUP, rows, GROUP, 0)
            number += 1
        rest = self._elements - whole
        if rest:
            padding = rest % per_byte
            width = rest + padding
            yield _Part(number, whole, whole // per_byte, whole // GROUP, 1, width, padding)

    def _on_wire(self, wire: Tensor, part: _Part) -> tuple[Tensor, Tensor]:
        """A part's scales, bf16 ``[rows]``, and values, int8 ``[rows, width or width / 2]``."""
        scales = wire[: self._scale_bytes].view(torch.bfloat16)
        columns = part.width // 2 if self._packed else part.width
        values = wire[self._scale_bytes :].view(torch.int8)
        return (
            scales[part.first_group : part.first_group + part.rows],
            values[part.first_byte : part.first_byte + part.rows * columns].view(part.rows, -1),
        )

    @staticmethod
    def _of_tensor(values: Tensor, part: _Part) -> Tensor:
        end = part.first_value + part.rows * part.width - part.padding
        return values.view(-1)[part.first_value : end].view(part.rows, -1)

    def _rooms(self, part: _Part) -> list[Tensor]:
        size = part.rows * part.width
        return [room[:size].view(part.rows, part.width) for room in self._workspace.rooms]

    def encode(self, values: Tensor, wire: Tensor, key: int) -> None:
        for part in self._parts:
            x = self._of_tensor(values, part)
            room, other, third = self._rooms(part)
            if x.dtype != torch.float32 or part.padding:
                third[:, : x.shape[1]].copy_(x)
                third[:, x.shape[1] :].zero_()
                x = third
            if self._rotated and part.width == GROUP:
                x = torch.mm(x, self._workspace.hadamard, out=other)
            scales, quantized = self._on_wire(wire, part)
            scale = scales_of(torch.amax(torch.abs(x, out=room), 1), self._levels)
            scales.copy_(scale)
            noise = self._workspace.noise(key, part.number, room.numel()).view_as(room)
            torch.addcmul(noise, x, scale.reciprocal_().unsqueeze(1), out=room).floor_()
            quantized.copy_(pack(room) if self._packed else room)

    def decode(self, wire: Tensor, values: Tensor, key: int) -> None:
        for part in self._parts:
            target = self._of_tensor(values, part)
            room, other, third = self._rooms(part)
            scales, quantized = self._on_wire(wire, part)
            scale = scales.float().unsqueeze(1)
            rotated = self._rotated and part.width == GROUP
            direct = target.dtype == torch.float32 and not rotated and not part.padding
            found = target if direct else other
            if self._packed:
                unpack(quantized, room)
            else:
                room.copy_(quantized)
            torch.mul(room, scale, out=found)
            if rotated:
                found = torch.mm(found, self._workspace.hadamard, out=third)
            if not direct:
                target.copy_(found[:, : target.shape[1]])


def scales_of(largest: Tensor, levels: int) -> Tensor:
    """fp32 scales that bf16 can hold, for groups whose largest magnitudes are ``largest``."""
    scale = largest.mul_(_ROOM / levels).clamp_(min=_SMALLEST_SCALE)
    # Up to the next bf16: the upper half of the bits, but one NaN for all, which stays one.
    bits = scale.view(torch.int32).bitwise_and_(_SIGN_OFF).clamp_(max=_NAN_BITS)
    bits.add_(_BF16_ROUND_UP).bitwise_and_(_BF16_MASK)
    return scale


def pack(values: Tensor) -> Tensor:
    """``[rows, width]`` whole numbers of -7..7 to ``[rows, width / 2]`` of -119..119, in place."""
    low, high = values.tensor_split(2, dim=1)
    return low.add_(high, alpha=_NIBBLE)


def unpack(packed: Tensor, values: Tensor) -> None:
    """Undo :func:`pack`: int8 ``[rows, width / 2]`` to fp32 ``[rows, width]``."""
    low, high = values.tensor_split(2, dim=1)
    low.copy_(packed)
    torch.round(torch.mul(low, 1 / _NIBBLE, out=high), out=high)
    low.sub_(high, alpha=_NIBBLE)
