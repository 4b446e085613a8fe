"""One round of a route: every member gives pieces to some others, and gets some from others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from ray_train_geo.transport.base import Pending, Transport

__all__ = ["Exchange"]


class Exchange:
    """One member's messages of one round, started.

    Args:
        pieces: flat tensors of one dtype; their sizes are the same for all members.
        outgoing, incoming: the other rank -> numbers of the pieces.

    Attributes:
        pending: what is under way.
    """

    def __init__(
        self,
        transport: Transport,
        pieces: Sequence[torch.Tensor],
        outgoing: Mapping[int, Sequence[int]],
        incoming: Mapping[int, Sequence[int]],
    ) -> None:
        def elements(numbers: Sequence[int]) -> int:
            return sum(pieces[n].numel() for n in numbers)

        ranks = range(transport.size)
        sent = [elements(outgoing.get(rank, ())) for rank in ranks]
        received = [elements(incoming.get(rank, ())) for rank in ranks]
        leaving = [pieces[n] for rank in ranks for n in outgoing.get(rank, ())]
        self._coming = [n for rank in ranks for n in incoming.get(rank, ())]
        self._sizes = [pieces[n].numel() for n in self._coming]
        self._message = pieces[0].new_empty(sum(received))
        outgoing_message = torch.cat(leaving) if leaving else pieces[0].new_empty(0)
        self.pending: Pending = transport.all_to_all(
            outgoing_message, sent, self._message, received
        )

    def received(self) -> Iterator[tuple[int, torch.Tensor]]:
        """What has come, once nothing is pending: (piece's number, piece).

        In the order of ranks, so that a sum does not depend on who came first.
        """
        return zip(self._coming, self._message.split(self._sizes), strict=True)
