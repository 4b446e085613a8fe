"""The end of a step: a few sums over all workers, through rank 0.

    rank 1 ──┐                     ┌─▶ rank 1
    rank 2 ──┼─▶ rank 0: the sum ──┼─▶ rank 2        a ring of n workers would take
    rank 3 ──┘                     └─▶ rank 3        2 (n - 1) latencies instead of 2

Nobody has the sums before every worker has given its part, and all get the same bits.

Receives are posted when the step begins: a message for which there is no receive yet has to ask
for one first, which on a link between continents costs a round trip.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ray_train_geo.transport.base import Pending, Transport

__all__ = ["Commit"]


class Commit:
    """One worker's part in it.

    Args:
        world: the group of all workers.
        sums: how many numbers are summed.
    """

    def __init__(self, world: Transport, sums: int) -> None:
        rows = world.size if world.rank == 0 else 1
        self._world = world
        self._rows = torch.zeros(rows, sums, dtype=torch.float64)
        self._part = torch.zeros(sums, dtype=torch.float64)
        self._coming: list[Pending] = []
        self._sent: list[Pending] = []

    def begin(self) -> None:
        """A new step, at whose end one's part is given."""
        if self._world.rank == 0:
            others = range(1, self._world.size)
            self._coming = [self._world.recv(self._rows[peer], peer) for peer in others]
        else:
            self._coming = [self._world.recv(self._rows[0], 0)]

    def agree(self, mine: Sequence[float], deadline_s: float) -> list[float]:
        """Sum ``mine`` over all workers, in fp64; raises as :meth:`sums`."""
        self.give(mine)
        return self.sums(deadline_s)

    def give(self, mine: Sequence[float]) -> None:
        """One's own part; others may have the sums from now on."""
        self._part = torch.tensor(list(mine), dtype=torch.float64)
        self._sent = [self._world.send(self._part, 0)] if self._world.rank > 0 else []

    def sums(self, deadline_s: float) -> list[float]:
        """The sums over all workers.

        Raises:
            TransportError: a worker is gone or too slow.
        """
        for pending in self._coming:
            pending.wait(deadline_s)
        total = self._rows[0]
        if self._world.rank == 0:
            self._rows[0] = self._part
            total = self._rows.sum(0)
            self._sent = [self._world.send(total, peer) for peer in range(1, self._world.size)]
        for pending in self._sent:
            pending.wait(deadline_s)
        found: list[float] = total.tolist()
        return found
