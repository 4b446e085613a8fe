"""What a codec does to a message between stages, as the planner sees it: bytes and time.

int8 and int4 carry one fp16 scale for each group of 128 values (as in AQ-SGD, Wang et al., NeurIPS
2022, and TAH-Quant, 2025).  Encoding and decoding are bound by memory: a codec reads the tensor
twice (once for the scales) and writes it once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from ray_train_geo.model.catalog import BYTES_PER_ELEMENT

__all__ = ["CODECS", "Codec", "CodecName", "codec_s", "wire_bytes"]

CodecName = Literal["none", "bf16", "int8", "int4"]

_GROUP = 128
_SCALE_BYTES = 2


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


def wire_bytes(codec: str, elements: int, precision: str) -> float:
    """Bytes on the wire of a message of ``elements`` values of ``precision``."""
    found = CODECS[codec]
    if not found.bits:
        return elements * BYTES_PER_ELEMENT[precision]
    scales = elements / _GROUP * _SCALE_BYTES if found.scaled else 0.0
    return elements * found.bits / 8 + scales


def codec_s(codec: str, elements: int, precision: str, memory_bytes_per_s: float) -> float:
    """Seconds that a device computes to encode, or to decode, one message; 0 for ``none``."""
    if codec == "none":
        return 0.0
    raw = elements * BYTES_PER_ELEMENT[precision]
    passes = 2 if CODECS[codec].scaled else 1
    return (passes * raw + wire_bytes(codec, elements, precision)) / memory_bytes_per_s
