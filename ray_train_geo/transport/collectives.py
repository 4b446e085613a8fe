"""Collectives made of messages, for transports that have their own way with each message.

Direct (three ranks, shard ``i`` belongs to rank ``i``), where every pair talks at once::

    reduce_scatter   rank 0 ◀── shard 0 ── rank 1, rank 2      each adds up its own shard
    all_gather       rank 0 ─── shard 0 ─▶ rank 1, rank 2      each hands its own shard out

Ring, where a rank talks to its neighbours only: ``n - 1`` rounds in which a shard travels once
around and is added up, and ``n - 1`` in which the sums do (Thakur et al., 2005).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from ray_train_geo.transport.base import Pending

__all__ = [
    "Messages",
    "Together",
    "all_gather",
    "all_to_all",
    "reduce_scatter",
    "ring_all_reduce",
]


class Messages(Protocol):
    """What a :class:`~ray_train_geo.transport.base.Transport` says of single messages."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def send(self, tensor: torch.Tensor, peer: int) -> Pending: ...

    def recv(self, tensor: torch.Tensor, peer: int) -> Pending: ...


class Together:
    """Several operations as one, and what is to be computed once all are done."""

    def __init__(
        self, operations: Sequence[Pending], then: Callable[[], None] | None = None
    ) -> None:
        self._operations = operations
        self._then = then
        self.done = False

    def wait(self, timeout_s: float) -> None:
        if self.done:
            return
        for operation in self._operations:
            operation.wait(timeout_s)
        if self._then is not None:
            self._then()
        self.done = True


def reduce_scatter(messages: Messages, tensor: torch.Tensor, shards: Sequence[int]) -> Pending:
    """As :meth:`~ray_train_geo.transport.base.Transport.reduce_scatter`."""
    slices = tensor.split(list(shards))
    mine = slices[messages.rank]
    received: dict[int, torch.Tensor] = {}
    operations: list[Pending] = []
    if mine.numel():
        for peer in _peers(messages):
            received[peer] = torch.empty_like(mine)
            operations.append(messages.recv(received[peer], peer))
    operations += [messages.send(slices[p], p) for p in _peers(messages) if slices[p].numel()]

    def add_up() -> None:
        # In the order of ranks, so that the sum does not depend on who arrived first.
        if not received:
            return
        parts = [mine if rank == messages.rank else received[rank] for rank in range(messages.size)]
        total = parts[0] + parts[1]
        for part in parts[2:]:
            total += part
        mine.copy_(total)

    return Together(operations, add_up)


def all_gather(messages: Messages, tensor: torch.Tensor, shards: Sequence[int]) -> Pending:
    """As :meth:`~ray_train_geo.transport.base.Transport.all_gather`."""
    slices = tensor.split(list(shards))
    mine = slices[messages.rank]
    operations = [messages.recv(slices[p], p) for p in _peers(messages) if slices[p].numel()]
    if mine.numel():
        operations += [messages.send(mine, p) for p in _peers(messages)]
    return Together(operations)


def all_to_all(
    messages: Messages,
    outgoing: torch.Tensor,
    sent: Sequence[int],
    incoming: torch.Tensor,
    received: Sequence[int],
) -> Pending:
    """As :meth:`~ray_train_geo.transport.base.Transport.all_to_all`."""
    leaving, coming = outgoing.split(list(sent)), incoming.split(list(received))
    operations = [messages.recv(coming[p], p) for p in _peers(messages) if received[p]]
    operations += [messages.send(leaving[p], p) for p in _peers(messages) if sent[p]]
    return Together(operations)


def ring_all_reduce(messages: Messages, tensor: torch.Tensor, deadline_s: float) -> None:
    """Sum a contiguous ``tensor`` over all ranks, in place, with the same bits on every rank.

    Returns when the sum is there; no single wait is longer than ``deadline_s``.
    """
    rank, size = messages.rank, messages.size
    right, left = (rank + 1) % size, (rank - 1) % size
    shards = tensor.view(-1).tensor_split(size)
    sent: list[Pending] = []

    def turn(outgoing: int, incoming: torch.Tensor) -> None:
        coming = messages.recv(incoming, left) if incoming.numel() else None
        if shards[outgoing].numel():
            sent.append(messages.send(shards[outgoing], right))
        if coming is not None:
            coming.wait(deadline_s)

    for k in range(size - 1):
        mine = shards[(rank - k - 1) % size]
        partial = torch.empty_like(mine)
        turn((rank - k) % size, partial)
        mine += partial
    for pending in sent:  # the sums are received where these partial ones lie
        pending.wait(deadline_s)
    sent.clear()
    for k in range(size - 1):
        turn((rank - k + 1) % size, shards[(rank - k) % size])
    for pending in sent:
        pending.wait(deadline_s)


def _peers(messages: Messages) -> list[int]:
    """The other ranks, each starting behind itself, so that not all send to rank 0 first."""
    return [(messages.rank + i) % messages.size for i in range(1, messages.size)]
