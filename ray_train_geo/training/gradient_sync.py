"""Summing a layer's gradients over all its holders, while backward goes on.

    backward   │ L7 │ L6 │ L5 │ L4 │ L3 │ ...
    bucket 0        └──── L7 L6 on the wire ───┘
    bucket 1                  └──── L5 L4 on the wire ────┘

``allreduce``   one all-reduce a bucket.
``sharded_ps``  each holder is the parameter server of one shard: it gets everybody's gradients
                for it (reduce-scatter) and hands out the sum (all-gather).
``central_ps``  the same with one shard that holds everything, at the lowest rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from ray_train_geo.observe.trace import Tracer
from ray_train_geo.spec import GradientSyncName
from ray_train_geo.training.buckets import Bucket
from ray_train_geo.transport.base import Pending, Transport

__all__ = ["GradientSync", "even_shards"]


class _Started(NamedTuple):
    bucket: int
    pending: Pending


class GradientSync:
    """The gradient sync of one worker.

    Args:
        buckets: what is summed together, in the order in which it must start.
        buffers: the flat fp32 gradients of the buckets that others hold too, summed in place.
        transports: the group of each set of holders with more than one rank.
        deadline_s: longest wait for one bucket, in seconds.
    """

    def __init__(
        self,
        buckets: Sequence[Bucket],
        buffers: Mapping[int, torch.Tensor],
        transports: Mapping[tuple[int, ...], Transport],
        mode: GradientSyncName,
        tracer: Tracer,
    ) -> None:
        self._buckets = buckets
        self._buffers = buffers
        self._transports = transports
        self._mode = mode
        self._tracer = tracer
        self._ready = [False] * len(buckets)
        self._next = 0
        self._started: list[_Started] = []
        self._step = 0

    def begin(self, step: int) -> None:
        """A new step: nothing is ready yet."""
        self._step = step
        # What nobody else holds is not waited for.
        self._ready = [bucket.holders not in self._transports for bucket in self._buckets]
        self._next = 0
        self._started = []

    def ready(self, bucket: int) -> None:
        """The gradients of ``bucket`` are complete here: send them as soon as it is their turn."""
        self._ready[bucket] = True
        self._advance()

    def _advance(self) -> None:
        while self._next < len(self._buckets) and self._ready[self._next]:
            self._start(self._next)
            self._next += 1

    def _start(self, index: int) -> None:
        transport = self._transports.get(self._buckets[index].holders)
        if transport is None:
            return  # nobody else holds these layers
        buffer = self._buffers[index]
        if self._mode == "allreduce":
            pending = transport.all_reduce(buffer)
        else:
            pending = transport.reduce_scatter(buffer, self._shards(index))
        self._started.append(_Started(index, pending))

    def _shards(self, index: int) -> list[int]:
        elements, ranks = self._buffers[index].numel(), len(self._buckets[index].holders)
        if self._mode == "central_ps":
            return [elements] + [0] * (ranks - 1)
        return even_shards(elements, ranks)

    def finish(self, deadline_s: float) -> None:
        """Wait until every buffer holds the sum over its holders.

        Raises:
            TransportError: a holder is gone or too slow; the step must not be applied.
        """
        self._advance()
        if self._next < len(self._buckets):
            raise RuntimeError(f"bucket {self._next} never became ready")
        gathers: list[Pending] = []
        for index, pending in self._started:
            with self._tracer.span("sync", f"bucket {index}", self._step, None):
                pending.wait(deadline_s)
                if self._mode != "allreduce":
                    transport = self._transports[self._buckets[index].holders]
                    gathers.append(transport.all_gather(self._buffers[index], self._shards(index)))
        if gathers:
            with self._tracer.span("sync", "gather", self._step, None):
                for pending in gathers:
                    pending.wait(deadline_s)


def even_shards(elements: int, ranks: int) -> list[int]:
    """``elements`` cut into ``ranks`` contiguous shards that differ by one at most."""
    return [elements // ranks + (rank < elements % ranks) for rank in range(ranks)]
