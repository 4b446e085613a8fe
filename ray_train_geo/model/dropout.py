"""Dropout whose mask depends on what is computed, never on who computes it.

The mask of an element is a pure function of (seed, step, microbatch, layer, site, element index),
with the same bits on every device: a ``torch.Generator`` can't promise that, because CUDA spreads
its counters by the GPU's size.  Here a counter is hashed with int64 tensor arithmetic:

    (seed, step, microbatch) --> key --> layer's key --(site, index / 4)--> 64 bits = 4 draws

The hash is splitmix64's finaliser (Steele, Lea and Flood, OOPSLA 2014; constants of Stafford's
mix 13).  torch has no unsigned 64-bit shift, so a logical shift is an arithmetic one and a mask.
The key is a tensor and not a number, so that ``torch.compile`` does not compile anew for each.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["ATTENTION", "EMBEDDING", "MLP", "dropout", "dropout_key", "layer_keys"]

_WORD = 2**64
_GAMMA = 0x9E3779B97F4A7C15
_SHIFTS = (30, 27, 31)
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_DRAWS = 2**16


def _mix(x: int) -> int:
    """splitmix64's finaliser on an unsigned 64-bit number."""
    for shift, multiplier in zip(_SHIFTS, (*_MULTIPLIERS, 1), strict=True):
        x = (x ^ (x >> shift)) * multiplier % _WORD
    return x


def _signed(x: int) -> int:
    """The int64 with the bits of the unsigned 64-bit ``x``."""
    return x - _WORD if x >= _WORD // 2 else x


_SIGNED_MULTIPLIERS = tuple(_signed(m) for m in _MULTIPLIERS)

ATTENTION, MLP, EMBEDDING = (_signed(_mix(site * _GAMMA % _WORD)) for site in (1, 2, 3))
"""Sites of a layer: after its attention, after its MLP, and (layer 0) on the embedding."""


def _mix_(x: Tensor) -> Tensor:
    """:func:`_mix` on an int64 tensor, in place."""
    for i, shift in enumerate(_SHIFTS):
        x.bitwise_xor_((x >> shift).bitwise_and_(2 ** (64 - shift) - 1))
        if i < len(_SIGNED_MULTIPLIERS):
            x.mul_(_SIGNED_MULTIPLIERS[i])
    return x


def dropout_key(seed: int, step: int, microbatch: int) -> Tensor:
    """The key of one microbatch: a 0-dim int64 CPU tensor.

    Args:
        microbatch: its global index in the step, over all pipelines.
    """
    key = 0
    for value in (seed, step, microbatch):
        key = _mix((key + _GAMMA + value) % _WORD)
    return torch.tensor(_signed(key), dtype=torch.int64)


def layer_keys(key: Tensor, first: int, last: int) -> tuple[Tensor, ...]:
    """The keys of layers ``[first, last)``, global ids, under a microbatch's ``key``."""
    ids = torch.arange(first + 1, last + 1, dtype=torch.int64)
    return _mix_(ids.mul_(_signed(_GAMMA)).add_(key)).unbind()


def dropout(x: Tensor, p: float, layer_key: Tensor | None, site: int) -> Tensor:
    """Zero each element of ``x`` with probability ``p`` and scale the rest by ``1 / (1 - p)``.

    ``p`` is rounded to a multiple of 1/65536 and the scale is exact for the rounded one.

    Args:
        x: floating point, any shape; elements count in row-major order.
        layer_key: one of :func:`layer_keys`, on the CPU wherever ``x`` is; None (evaluation, or
            a model without dropout) returns ``x`` itself.
        site: ``ATTENTION``, ``MLP`` or ``EMBEDDING``.
    """
    kept_draws = max(1, round((1 - p) * _DRAWS))
    if layer_key is None or kept_draws == _DRAWS:
        return x
    elements = x.numel()
    counter = torch.arange(-(-elements // 4), dtype=torch.int64, device=x.device)
    draws = _mix_(counter.add_(layer_key ^ site)).view(torch.int16)[:elements]
    # In place, and then narrowed to a byte: several times cheaper on a CPU than a bool mask.
    keep = draws.lt_(kept_draws - _DRAWS // 2).to(torch.uint8).view(x.shape)
    return (x * keep).mul_(_DRAWS / kept_draws)
