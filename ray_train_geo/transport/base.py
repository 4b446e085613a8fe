"""What carries tensors between workers: one small interface, two real implementations.

A :class:`Transport` is a *group* of ranks that talk to each other: two for a directed edge of a
pipeline, all holders of a run of layers for gradient sync.  Operations start at once and return
a :class:`Pending`; nothing is copied behind the caller's back, so a tensor that was handed to an
operation must be left alone until the operation's ``wait`` has returned.

Every wait has a deadline.  The first error makes the whole transport unusable: the caller aborts
it, which releases whoever waits on it here, and breaks the peers' waits too (their sockets or
communicators close), so that an error reaches all members within a round trip.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

__all__ = ["Pending", "Transport"]


class Pending(Protocol):
    """An operation under way."""

    def wait(self, timeout_s: float) -> None:
        """Return once the operation's tensors may be used on the current stream.

        On a GPU the host may return before the bytes have moved: the current CUDA stream then
        waits for them, and a peer that never answers shows at the next
        :meth:`Transport.synchronize`.

        Raises:
            DeadlineError: it took longer than ``timeout_s`` seconds.
            AbortedError: this side aborted the transport.
            TransportError: the peer went away, or the backend failed.
        """


class Transport(Protocol):
    """A group of ``size`` ranks; ``rank`` is this side's number in it."""

    rank: int
    size: int

    def send(self, tensor: torch.Tensor, peer: int) -> Pending:
        """Start sending a contiguous ``tensor``; messages of a pair keep their order."""

    def recv(self, tensor: torch.Tensor, peer: int) -> Pending:
        """Start receiving into a contiguous ``tensor`` of the sent shape and dtype."""

    def all_reduce(self, tensor: torch.Tensor) -> Pending:
        """Start summing ``tensor`` over all ranks, in place, with the same bits on every rank."""

    def reduce_scatter(self, tensor: torch.Tensor, shards: Sequence[int]) -> Pending:
        """Start summing a flat ``tensor``; rank ``i`` gets the sum of shard ``i``, in place.

        ``shards[i]`` elements belong to rank ``i``; they lie one behind the other and may be 0.
        What lies outside one's own shard is undefined afterwards.
        """

    def all_gather(self, tensor: torch.Tensor, shards: Sequence[int]) -> Pending:
        """Start filling a flat ``tensor``: shard ``i`` of rank ``i`` goes to all, in place."""

    def all_to_all(
        self,
        outgoing: torch.Tensor,
        sent: Sequence[int],
        incoming: torch.Tensor,
        received: Sequence[int],
    ) -> Pending:
        """Start giving every rank a part of ``outgoing``, and getting one from each.

        Part ``i`` of ``outgoing``, ``sent[i]`` elements long, goes to rank ``i``; part ``i`` of
        ``incoming``, ``received[i]`` long, comes from it.  Both are flat; a part may be empty,
        and one's own is left alone.
        """

    def synchronize(self, timeout_s: float) -> None:
        """Wait on the host until all operations started so far are done.

        Raises:
            DeadlineError, AbortedError, TransportError: as :meth:`Pending.wait`.
        """

    def abort(self) -> None:
        """Break all operations, here and at the peers, at once; callable from any thread."""

    def close(self) -> None:
        """Give up sockets, communicators and threads in good order; the peers may still finish."""
