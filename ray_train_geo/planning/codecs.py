"""What a codec does to a message between stages, as the planner sees it: bytes and time.

int8 and int4 carry one bf16 scale for each group of 128 values (group-wise scales as in AQ-SGD,
Wang et al., NeurIPS 2022, and TAH-Quant, 2025).  Encoding and decoding are bound by memory: a codec
reads the tensor twice (once for the scales) and writes it once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from ray_train_geo.model.catalog import BYTES_PER_ELEMENT, ModelDims, parameter_shapes
from ray_train_geo.spec_codecs import CodecSpec

__all__ = [
    "CODECS",
    "GROUP",
    "SCALE_BYTES",
    "SPARSE_BLOCK",
    "Codec",
    "CodecName",
    "codec_s",
    "gradient_bytes",
    "sparse_kept",
    "sparse_wire_bytes",
    "wire_bytes",
]

CodecName = Literal["none", "bf16", "int8", "int4"]

GROUP = 128
"""Values that share a scale; the last group of a message may be smaller."""

SCALE_BYTES = 2

SPARSE_BLOCK = 256
"""Values that a sparse codec chooses the largest of: a place in a block is one byte."""


@dataclass(frozen=True, slots=True)
class Codec:
    """Bits of one value on the wire (0: as it is), and whether groups of values have a scale."""

    bits: int
    scaled: bool = False


CODECS: Mapping[str, Codec] = {
    "none": Codec(0),
    "bf16": Codec(16),
    "int8": Codec(8, scaled=True),
    "int4": Codec(4, scaled=True),
}
"""The codecs that a plan can name."""


def wire_bytes(codec: str, elements: int, precision: str) -> int:
    """Bytes on the wire of a message of ``elements`` values of ``precision``, to the byte."""
    found = CODECS[codec]
    if not found.bits:
        return elements * BYTES_PER_ELEMENT[precision]
    scales = -(-elements // GROUP) * SCALE_BYTES if found.scaled else 0
    return -(-elements * found.bits // 8) + scales


def codec_s(codec: str, elements: int, precision: str, memory_bytes_per_s: float) -> float:
    """Seconds that a device computes to encode, or to decode, one message; 0 for ``none``."""
    if codec == "none":
        return 0.0
    raw = elements * BYTES_PER_ELEMENT[precision]
    passes = 2 if CODECS[codec].scaled else 1
    return (passes * raw + wire_bytes(codec, elements, precision)) / memory_bytes_per_s


def sparse_kept(fraction: float) -> int:
    """Values that a sparse codec keeps of a block: about ``fraction`` of it, and an even number."""
    return max(2, 2 * round(fraction * SPARSE_BLOCK / 2))


def sparse_wire_bytes(elements: int, stride: int, fraction: float) -> int:
    """Bytes of a sparse message: a scale a block, and a byte and a half a value that is kept."""
    blocks = -(-elements // (stride * SPARSE_BLOCK))
    return blocks * SCALE_BYTES + blocks * sparse_kept(fraction) * 3 // 2


def gradient_bytes(codecs: CodecSpec, dims: ModelDims) -> float:
    """Bytes of a message of the gradient sync for each gradient in it, on average.

    Gradients are summed in fp32 at every precision, so 4 without a codec.
    """
    elements = GROUP * SPARSE_BLOCK * codecs.topk_stride  # any number that leaves no rest
    match codecs.gradients:
        case "topk":
            sent = sparse_wire_bytes(elements, codecs.topk_stride, codecs.topk_fraction)
            return sent / elements
        case "powersgd":
            return _low_rank_bytes(codecs.powersgd_rank, dims)
        case codec:
            return wire_bytes(codec, elements, "fp32") / elements


def _low_rank_bytes(rank: int, dims: ModelDims) -> float:
    """PowerSGD's two thin matrices for each matrix, of which both halves of a sum carry one."""
    shapes = parameter_shapes(dims).values()
    sent = sum(min(rank * (s[0] + math.prod(s[1:])) / 2, math.prod(s)) for s in shapes)
    return BYTES_PER_ELEMENT["fp32"] * sent / sum(map(math.prod, shapes))
