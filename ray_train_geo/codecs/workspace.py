"""What the codecs of a worker share: random numbers for their rounding, and room to work.

Stochastic rounding needs a random number for each value, and a hash for each would cost more than
all else.  So there is one table of numbers in [0, 1), evenly spread and shuffled, and each part of
a message reads it from a place of its own, drawn from the message's key::

    table    | u0 u1 u2 ........ uT | u0 u1 u2 ...        twice, so that no reading wraps
    part 0          |--------------------|
    part 1    |--------------------|

Over all keys each value sees each number of the table equally often: rounding is unbiased to within
one in 65,536.  Which numbers it sees is a pure function of the key, never of who rounds.

On a CPU a message is worked on part by part, so that the passes over a part stay in the cache.
"""

from __future__ import annotations

import hashlib
from functools import cached_property

import torch
from torch import Tensor

from ray_train_geo.planning.codecs import GROUP

__all__ = ["Workspace", "noise_key"]

_NOISE = 2**16
_CPU_PART, _GPU_PART = 2**18, 2**22
"""Values in one part: of a pass in the cache, against what starting a pass costs (measured)."""
_ROOMS = 3
_WORD = 2**64
_WEYL = 0x9E3779B97F4A7C15  # 2^64 / the golden ratio: its multiples spread evenly
_TABLE_SEED = 0


class Workspace:
    """Noise, room and the Hadamard matrix on one device; for one thread.

    Attributes:
        part: most values of a message that are worked on at once.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.part = _GPU_PART if device.type == "cuda" else _CPU_PART

    @cached_property
    def rooms(self) -> tuple[Tensor, ...]:
        """Three of fp32 ``[part]``, to write to."""
        return tuple(torch.empty(self.part, device=self.device) for _ in range(_ROOMS))

    @cached_property
    def hadamard(self) -> Tensor:
        """fp32 ``[128, 128]``: orthonormal and its own inverse (Sylvester's construction)."""
        matrix = torch.ones(1, 1, device=self.device)
        while len(matrix) < GROUP:
            matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
        return matrix.mul_(GROUP**-0.5)

    @cached_property
    def _table(self) -> Tensor:
        shuffled = torch.randperm(_NOISE, generator=torch.Generator().manual_seed(_TABLE_SEED))
        # One more period than a part is long: a part may begin anywhere in the first.
        return (shuffled.float() / _NOISE).repeat(self.part // _NOISE + 1).to(self.device)

    def noise(self, key: int, part: int, values: int) -> Tensor:
        """``[values]`` numbers in [0, 1) for part number ``part`` of the message with ``key``."""
        start = (key + part * _WEYL) % _WORD * _NOISE // _WORD
        return self._table[start : start + values]


def noise_key(*facts: int | str) -> int:
    """The key, below 2^64, of what ``facts`` name: (seed, step, microbatch, layer, direction)."""
    digest = hashlib.blake2b("/".join(map(str, facts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")
