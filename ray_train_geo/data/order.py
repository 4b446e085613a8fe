"""The sample order: a pure function of (seed, step, microbatch), whoever computes it (level 0).

    position   0 1 2 ... samples-1 | samples ... 2*samples-1 | ...
    epoch               0          |            1            |
    sample     permutation(seed,0) |   permutation(seed,1)   |

Step ``s`` takes positions ``(s-1)*global_batch`` to ``s*global_batch - 1``, so epochs may end in
the middle of a step and every sample still occurs once per epoch.  The permutation is computed
for the positions asked for, and never stored: it works for any number of samples.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ray_train_geo.errors import DataError, SpecError

__all__ = ["SampleOrder"]

_ROUNDS = 8
_MAX_SAMPLES = 2**62


@dataclass(frozen=True, slots=True)
class SampleOrder:
    """Which samples a microbatch holds.

    Args:
        seed: any integer; another seed gives another order.
        samples: number of samples in the dataset.
        global_batch: samples of one step.
        microbatch: samples of one microbatch; divides ``global_batch``.

    Raises:
        DataError: there are no samples, or more than 2**62.
        SpecError: ``microbatch`` does not divide ``global_batch``.
    """

    seed: int
    samples: int
    global_batch: int
    microbatch: int

    def __post_init__(self) -> None:
        if not 1 <= self.samples <= _MAX_SAMPLES:
            raise DataError(f"a dataset holds 1 to 2**62 samples, not {self.samples}")
        if self.microbatch < 1 or self.global_batch < 1 or self.global_batch % self.microbatch:
            raise SpecError(
                f"training.microbatch ({self.microbatch}) must divide training.global_batch "
                f"({self.global_batch})"
            )

    def indices(self, step: int, microbatch: int) -> npt.NDArray[np.int64]:
        """Samples of one microbatch, ``[microbatch size]``, each in ``0..samples-1``.

        Args:
            step: counts from 1.
            microbatch: global index within the step, ``0..global_batch/microbatch - 1``.

        Raises:
            IndexError: no such step or microbatch.
        """
        count = self.global_batch // self.microbatch
        if step < 1 or not 0 <= microbatch < count:
            raise IndexError(
                f"no microbatch {microbatch} in step {step}: steps count from 1, and a step has "
                f"microbatches 0 to {count - 1}"
            )
        first = (step - 1) * self.global_batch + microbatch * self.microbatch
        # Python integers up to here: positions of a long run may pass 2**63, offsets can't.
        epoch, offset = divmod(first, self.samples)
        out = np.empty(self.microbatch, dtype=np.int64)
        filled = 0
        while filled < self.microbatch:
            n = min(self.microbatch - filled, self.samples - offset)
            positions = np.arange(offset, offset + n, dtype=np.uint64)
            out[filled : filled + n] = _permute(positions, self.samples, self.seed, epoch)
            filled, epoch, offset = filled + n, epoch + 1, 0
        return out


def _permute(
    positions: npt.NDArray[np.uint64], samples: int, seed: int, epoch: int
) -> npt.NDArray[np.int64]:
    """Images of ``positions`` under the permutation of ``0..samples-1`` keyed by (seed, epoch).

    A balanced Feistel network permutes the next power of four; values that land outside are sent
    through it again until they land inside (cycle walking: Black and Rogaway, "Ciphers with
    Arbitrary Finite Domains", CT-RSA 2002).  At least a quarter of the domain is inside, so a
    position takes fewer than four passes on average.
    """
    half_bits = max(1, ((samples - 1).bit_length() + 1) // 2)
    digest = hashlib.blake2b(f"{seed}/{epoch}".encode(), digest_size=8 * _ROUNDS).digest()
    keys = np.frombuffer(digest, dtype="<u8").astype(np.uint64)
    values = _feistel(positions, keys, half_bits)
    outside = np.flatnonzero(values >= samples)
    while outside.size:
        values[outside] = _feistel(values[outside], keys, half_bits)
        outside = outside[values[outside] >= samples]
    return values.astype(np.int64)


def _feistel(
    values: npt.NDArray[np.uint64], keys: npt.NDArray[np.uint64], half_bits: int
) -> npt.NDArray[np.uint64]:
    shift = np.uint64(half_bits)
    mask = np.uint64((1 << half_bits) - 1)
    left, right = values >> shift, values & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return (left << shift) | right


def _mix(z: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finalizer of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), modulo 2**64."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
