"""What makes a tensor smaller for the wire, and whole again.

A :class:`Codec` is made for tensors of one size, so that its messages have one size too: a receiver
can post its buffer before anything was sent.

Values that are not finite stay that: whatever shares a group with a NaN or an infinity is decoded
as NaN or infinity, so that an overflow is seen behind a codec as it is without one.
"""

from __future__ import annotations

from typing import Final, Protocol

from torch import Tensor

__all__ = ["SAMPLES", "Codec"]

SAMPLES: Final = 0x10000
"""What a codec looks at follows from the remainder of a key by this number, how it rounds from all
of it: so the parts of a sum can be alike in the one and differ in the other."""


class Codec(Protocol):
    """Encodes tensors of one number of elements.  Its methods are for one thread.

    Attributes:
        wire_bytes: size of an encoded tensor.
    """

    wire_bytes: int

    def encode(self, values: Tensor, wire: Tensor, key: int) -> None:
        """Write ``values`` to ``wire``.

        Args:
            values: floating point, contiguous, of any shape; it is not changed.
            wire: uint8 ``[wire_bytes]``.
            key: fixes the rounding (:func:`~ray_train_geo.codecs.workspace.noise_key`).
        """

    def decode(self, wire: Tensor, values: Tensor, key: int) -> None:
        """Write to ``values`` what :meth:`encode` was given, as well as ``wire`` knows it.

        Args:
            values: contiguous, of the encoded tensor's number of elements.
            key: with the same remainder by ``SAMPLES`` as the encoding's.
        """
