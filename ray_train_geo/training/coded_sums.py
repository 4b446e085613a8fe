"""Sums of encoded gradients: each piece is summed in fp32 along its route, and encoded once more.

    rank 0 ── encoded piece 1 ──▶ rank 1: decode all, add up, encode the sum
    rank 2 ── encoded piece 1 ──▶         │
                                          └── the same bytes, back along the route ──▶ all: decode

All holders decode the same bytes, the one that made them too: so they end with the same bits.
Where a route has several rounds, a part is decoded, added to, and encoded in each.  With error
feedback each keeps what its own encodings have lost, of its parts and of the sums that it makes
(the two of CocktailSGD, Wang et al., ICML 2023, in one place).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain

import torch

from ray_train_geo.codecs.base import SAMPLES, Codec
from ray_train_geo.codecs.workspace import noise_key
from ray_train_geo.planning.sync_routes import Route, shards
from ray_train_geo.training.buckets import Bucket
from ray_train_geo.training.exchanges import Exchange
from ray_train_geo.training.residuals import Residuals
from ray_train_geo.transport.base import Pending, Transport

__all__ = ["CodedSums"]


class CodedSums:
    """See :class:`~ray_train_geo.training.gradient_sync.Sums`.

    Args:
        routes: of each of the groups.
        make: a codec for so many elements.
        residuals: None for a codec without error feedback.
    """

    def __init__(
        self,
        buckets: Sequence[Bucket],
        buffers: Mapping[int, torch.Tensor],
        transports: Mapping[tuple[int, ...], Transport],
        routes: Mapping[tuple[int, ...], Route],
        make: Callable[[int], Codec],
        seed: int,
        residuals: Residuals | None,
    ) -> None:
        self._buckets = buckets
        self._buffers = buffers
        self._transports = transports
        self._routes = routes
        self._turns = {h: route.turns(transports[h].rank) for h, route in routes.items()}
        self._make = make
        self._seed = seed
        self._residuals = residuals
        self._codecs: dict[int, Codec] = {}
        self._wires: dict[int, Sequence[torch.Tensor]] = {}
        self._step, self._scale = 0, 1.0

    def begin(self, step: int, scale: float) -> None:
        self._step, self._scale = step, scale

    def _codec(self, elements: int) -> Codec:
        if elements not in self._codecs:
            self._codecs[elements] = self._make(elements)
        return self._codecs[elements]

    def _slot_bytes(self, elements: int) -> int:
        """Of a piece's place in a message: even, as scales are read two bytes at a time."""
        return 2 * -(-self._codec(elements).wire_bytes // 2) if elements else 0

    def _encode(self, values: torch.Tensor, slot: torch.Tensor, key: int) -> None:
        codec = self._codec(values.numel())
        codec.encode(values, slot[: codec.wire_bytes], key)

    def _decode(self, index: int, slot: torch.Tensor, values: torch.Tensor) -> None:
        codec = self._codec(values.numel())
        codec.decode(slot[: codec.wire_bytes], values, self._key(index))

    def _key(self, index: int, *who: int | str) -> int:
        """How is rounded differs; what is looked at is the same for all parts of a sum."""
        bucket = self._seed, self._step, self._buckets[index].names[0]
        return noise_key(*bucket, *who) // SAMPLES * SAMPLES + noise_key(*bucket) % SAMPLES

    def rounds(self, index: int) -> Iterator[Pending]:
        holders, buffer = self._buckets[index].holders, self._buffers[index]
        transport, route, turns = (
            self._transports[holders],
            self._routes[holders],
            self._turns[holders],
        )
        pieces = buffer.split(shards(buffer.numel(), route.shares))
        wires = self._wires_of(index, [self._slot_bytes(piece.numel()) for piece in pieces])
        left: Sequence[torch.Tensor] = ()
        if self._residuals is not None:
            self._residuals.feed(index, buffer, self._scale)
            left = self._residuals.leftover(index).split([piece.numel() for piece in pieces])

        def encode(number: int, *who: int | str) -> None:
            if not len(wires[number]):
                return
            self._encode(pieces[number], wires[number], self._key(index, *who, number))
            if left:
                self._decode(index, wires[number], left[number])
                torch.sub(pieces[number], left[number], out=left[number])

        for turn in turns:
            for number in chain.from_iterable(turn.gives.values()):
                encode(number, "part", transport.rank)
            exchange = Exchange(transport, wires, turn.gives, turn.takes)
            yield exchange.pending
            for number, wire in exchange.received():
                if len(wire):
                    part = torch.empty_like(pieces[number])
                    self._decode(index, wire, part)
                    pieces[number].add_(part)
        for number in route.held(transport.rank):
            encode(number, "sum")
        if self._residuals is not None:
            self._residuals.settle(index, self._scale)
        for turn in reversed(turns):
            exchange = Exchange(transport, wires, turn.takes, turn.gives)
            yield exchange.pending
            for number, wire in exchange.received():
                wires[number].copy_(wire)
        for piece, wire in zip(pieces, wires, strict=True):
            if len(wire):
                self._decode(index, wire, piece)

    def _wires_of(self, index: int, sizes: Sequence[int]) -> Sequence[torch.Tensor]:
        """A place for each piece's encoding, the same ones in every step."""
        if index not in self._wires:
            device = self._buffers[index].device
            flat = torch.empty(sum(sizes), dtype=torch.uint8, device=device)
            self._wires[index] = flat.split(sizes)
        return self._wires[index]
