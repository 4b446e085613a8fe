"""Summing a layer's gradients over all its holders, while backward goes on.

    backward   │ L7 │ L6 │ L5 │ L4 │ L3 │ ...
    bucket 0        └──── L7 L6 on the wire ───┘
    bucket 1                  └──── L5 L4 on the wire ────┘

How a bucket is summed - by which route, as it is or encoded - is a :class:`Sums`: a few rounds of
messages, each started once the one before it has come.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

from ray_train_geo.observe.trace import Tracer
from ray_train_geo.training.buckets import Bucket
from ray_train_geo.transport.base import Pending, Transport

__all__ = ["GradientSync", "Sums"]


class Sums(Protocol):
    """Sums flat gradients over their holders, with the same bits at all of them."""

    def begin(self, step: int, scale: float) -> None:
        """A new step, whose gradients are times ``scale``."""

    def rounds(self, index: int) -> Iterator[Pending]:
        """Sum bucket number ``index``, in place.

        Yields:
            Each round, started.  It is to be waited for before the next one is asked for, and the
            sum is there after the last.  All holders have equally many.
        """


class _UnderWay(NamedTuple):
    bucket: int
    rounds: Iterator[Pending]
    pending: Pending


class GradientSync:
    """The gradient sync of one worker.

    Args:
        buckets: what is summed together, in the order in which it must start.
        transports: the group of each set of holders with more than one rank.
        sums: how.
    """

    def __init__(
        self,
        buckets: Sequence[Bucket],
        transports: Mapping[tuple[int, ...], Transport],
        sums: Sums,
        tracer: Tracer,
    ) -> None:
        self._buckets = buckets
        self._transports = transports
        self._sums = sums
        self._tracer = tracer
        self._ready = [False] * len(buckets)
        self._next = 0
        self._under_way: deque[_UnderWay] = deque()
        self._step = 0

    def begin(self, step: int, scale: float = 1.0) -> None:
        """A new step, whose gradients are times ``scale``: nothing is ready yet."""
        self._step = step
        self._sums.begin(step, scale)
        # What nobody else holds is not waited for.
        self._ready = [bucket.holders not in self._transports for bucket in self._buckets]
        self._next = 0
        self._under_way.clear()

    def ready(self, bucket: int) -> None:
        """The gradients of ``bucket`` are complete here: send them as soon as it is their turn."""
        self._ready[bucket] = True
        self._advance()

    def _advance(self) -> None:
        while self._next < len(self._buckets) and self._ready[self._next]:
            self._start(self._next)
            self._next += 1

    def _start(self, index: int) -> None:
        if self._buckets[index].holders in self._transports:
            self._go_on(index, self._sums.rounds(index))

    def _go_on(self, bucket: int, rounds: Iterator[Pending]) -> None:
        pending = next(rounds, None)
        if pending is not None:
            self._under_way.append(_UnderWay(bucket, rounds, pending))

    def finish(self, deadline_s: float) -> None:
        """Wait until every buffer holds the sum over its holders.

        Raises:
            TransportError: a holder is gone or too slow; the step must not be applied.
        """
        self._advance()
        if self._next < len(self._buckets):
            raise RuntimeError(f"bucket {self._next} never became ready")
        while self._under_way:
            bucket, rounds, pending = self._under_way.popleft()
            with self._tracer.span("sync", f"bucket {bucket}", self._step, None):
                pending.wait(deadline_s)
                self._go_on(bucket, rounds)
