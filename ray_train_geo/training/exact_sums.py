"""Sums of gradients in fp32, by the plan's gradient-sync mode.

``allreduce``     one all-reduce a bucket (a ring).
``sharded_ps``    each holder is the parameter server of one shard: it gets everybody's gradients
                  for it (reduce-scatter) and hands out the sum (all-gather).
``central_ps``    the same with one shard that holds everything, at the lowest rank.
``hierarchical``, ``tree``
                  rounds of messages, first inside of a region (:mod:`.planning.sync_routes`).

But for the ring each number is summed up by one holder, who hands the sum to all others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from ray_train_geo.planning.sync_routes import ROUTED, Route, Turn, shards
from ray_train_geo.spec import GradientSyncName
from ray_train_geo.training.buckets import Bucket
from ray_train_geo.training.exchanges import Exchange
from ray_train_geo.transport.base import Pending, Transport

__all__ = ["ExactSums"]


class ExactSums:
    """See :class:`~ray_train_geo.training.gradient_sync.Sums`.

    Args:
        buffers: the flat fp32 gradients of the buckets that others hold too, summed in place.
        transports: the group of each set of holders with more than one rank.
        routes: of each of these groups; a ring has none.
    """

    def __init__(
        self,
        buckets: Sequence[Bucket],
        buffers: Mapping[int, torch.Tensor],
        transports: Mapping[tuple[int, ...], Transport],
        mode: GradientSyncName,
        routes: Mapping[tuple[int, ...], Route],
    ) -> None:
        self._buckets = buckets
        self._buffers = buffers
        self._transports = transports
        self._mode = mode
        self._routes = routes
        self._turns = {
            holders: route.turns(transports[holders].rank)
            for holders, route in routes.items()
            if mode in ROUTED
        }

    def begin(self, step: int, scale: float) -> None:
        """Nothing is kept from step to step."""

    def rounds(self, index: int) -> Iterator[Pending]:
        holders, buffer = self._buckets[index].holders, self._buffers[index]
        transport = self._transports[holders]
        if self._mode == "allreduce":
            yield transport.all_reduce(buffer)
            return
        route = self._routes[holders]
        if self._mode in ROUTED:
            yield from _along(route, self._turns[holders], transport, buffer)
            return
        sizes = shards(buffer.numel(), route.shares)
        yield transport.reduce_scatter(buffer, sizes)
        yield transport.all_gather(buffer, sizes)


def _along(
    route: Route, turns: Sequence[Turn], transport: Transport, buffer: torch.Tensor
) -> Iterator[Pending]:
    """The rounds of a sum along ``route``, in place."""
    pieces = buffer.split(shards(buffer.numel(), route.shares))
    for turn in turns:
        exchange = Exchange(transport, pieces, turn.gives, turn.takes)
        yield exchange.pending
        for number, part in exchange.received():
            pieces[number].add_(part)
    for turn in reversed(turns):
        exchange = Exchange(transport, pieces, turn.takes, turn.gives)
        yield exchange.pending
        for number, total in exchange.received():
            pieces[number].copy_(total)
