"""One group carried by several, each with TCP flows of its own.

A TCP flow has at most a window of bytes under way, so over a long round trip it may fill only a
part of a fast path.  Several fill more::

    message     │ 0 ─▶ flow 0 │ 1 ─▶ flow 1 │ 2 ─▶ flow 2 │      cut into even pieces
    collectives   bucket 0 ─▶ flow 0, bucket 1 ─▶ flow 1, ...     whole, in turns
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ray_train_geo.transport.base import Pending, Transport
from ray_train_geo.transport.collectives import Together

__all__ = ["StripedTransport"]

_SMALLEST_PIECE_BYTES = 2**16
"""A shorter message is not worth the cutting: it fits a flow's first windows."""


class StripedTransport:
    """A group over several groups of the same ranks; both sides must have as many.

    Args:
        flows: the groups; this takes them over.
    """

    def __init__(self, flows: Sequence[Transport]) -> None:
        self.rank = flows[0].rank
        self.size = flows[0].size
        self._flows = tuple(flows)
        self._collectives = 0

    def __repr__(self) -> str:
        return f"<rank {self.rank} of {self.size} over {len(self._flows)} flows>"

    def send(self, tensor: torch.Tensor, peer: int) -> Pending:
        pieces = self._pieces(tensor)
        return Together(
            [flow.send(piece, peer) for flow, piece in zip(self._flows, pieces, strict=False)]
        )

    def recv(self, tensor: torch.Tensor, peer: int) -> Pending:
        pieces = self._pieces(tensor)
        return Together(
            [flow.recv(piece, peer) for flow, piece in zip(self._flows, pieces, strict=False)]
        )

    def _pieces(self, tensor: torch.Tensor) -> Sequence[torch.Tensor]:
        """Views of ``tensor``, one a flow at most; the same for sender and receiver."""
        count = min(len(self._flows), tensor.nbytes // _SMALLEST_PIECE_BYTES)
        return (tensor,) if count < 2 else tensor.view(-1).tensor_split(count)

    def _turn(self) -> Transport:
        # Collectives of a group start in the same order on all ranks.
        self._collectives += 1
        return self._flows[self._collectives % len(self._flows)]

    def all_reduce(self, tensor: torch.Tensor) -> Pending:
        return self._turn().all_reduce(tensor)

    def reduce_scatter(self, tensor: torch.Tensor, shards: Sequence[int]) -> Pending:
        return self._turn().reduce_scatter(tensor, shards)

    def all_gather(self, tensor: torch.Tensor, shards: Sequence[int]) -> Pending:
        return self._turn().all_gather(tensor, shards)

    def all_to_all(
        self,
        outgoing: torch.Tensor,
        sent: Sequence[int],
        incoming: torch.Tensor,
        received: Sequence[int],
    ) -> Pending:
        return self._turn().all_to_all(outgoing, sent, incoming, received)

    def synchronize(self, timeout_s: float) -> None:
        for flow in self._flows:
            flow.synchronize(timeout_s)

    def abort(self) -> None:
        for flow in self._flows:
            flow.abort()

    def close(self) -> None:
        for flow in self._flows:
            flow.close()
