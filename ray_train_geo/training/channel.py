"""One direction of a pipeline edge: messages of one shape, in the schedule's order.

A receiver posts several receives ahead: a message then leaves its sender without first asking
for permission, which on a link between continents would cost a round trip each.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import torch

from ray_train_geo.observe.trace import Span, Tracer
from ray_train_geo.transport.base import Pending, Transport

__all__ = ["Receiver", "Sender"]


class _Posted(NamedTuple):
    tensor: torch.Tensor
    pending: Pending


class Sender:
    """Sends without waiting; :meth:`finish` waits until the peer has everything.

    Args:
        limit: sends under way at a time; one more waits for the oldest. On a link with a long
            round trip it must cover the messages that are in flight.
    """

    def __init__(self, transport: Transport, peer: int, tracer: Tracer, limit: int) -> None:
        self._transport = transport
        self._peer = peer
        self._tracer = tracer
        self._limit = limit
        self._sent: deque[Pending] = deque()
        self._step = 0
        self._watcher: ThreadPoolExecutor | None = None

    def begin(self, step: int) -> None:
        self._step = step

    def send(self, tensor: torch.Tensor, name: str, microbatch: int, deadline_s: float) -> None:
        """Start sending; ``tensor`` must not change until it has left."""
        while len(self._sent) >= self._limit:
            self._sent.popleft().wait(deadline_s)
        start_s = time.time()
        pending = self._transport.send(tensor.contiguous(), self._peer)
        # On a GPU a wait is for the caller's stream, and the host learns nothing by it.
        if self._tracer.enabled and not tensor.is_cuda:
            pending = self._watched(pending, name, microbatch, start_s, deadline_s)
        self._sent.append(pending)

    def finish(self, deadline_s: float) -> None:
        """Wait until every message has left."""
        while self._sent:
            self._sent.popleft().wait(deadline_s)

    def _watched(
        self, pending: Pending, name: str, microbatch: int, start_s: float, deadline_s: float
    ) -> Pending:
        """Record when the message has really left, which this thread is too busy to see."""
        if self._watcher is None:
            self._watcher = ThreadPoolExecutor(1, thread_name_prefix="watch-sends")
        step = self._step

        def watch() -> None:
            pending.wait(deadline_s)
            end_s = time.time()
            self._tracer.add(Span("send", name, start_s, end_s - start_s, step, microbatch))

        return _Watched(self._watcher.submit(watch))


class _Watched:
    """A send that another thread waits for, within its own deadline."""

    def __init__(self, watching: Future[None]) -> None:
        self._watching = watching

    def wait(self, timeout_s: float) -> None:
        self._watching.result()


class Receiver:
    """Receives messages of one shape, a few of them posted ahead.

    Args:
        ahead: receives posted at a time; each holds a buffer of one message.
    """

    def __init__(
        self,
        transport: Transport,
        peer: int,
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
        ahead: int,
        tracer: Tracer,
    ) -> None:
        self._transport = transport
        self._peer = peer
        self._shape = tuple(shape)
        self._dtype = dtype
        self._device = device
        self._ahead = ahead
        self._tracer = tracer
        self._posted: deque[_Posted] = deque()
        self._unposted = 0
        self._step = 0

    def begin(self, step: int, messages: int) -> None:
        """A new step, in which ``messages`` will come."""
        self._step = step
        self._unposted = messages
        for _ in range(min(self._ahead, messages)):
            self._post()

    def _post(self) -> None:
        tensor = torch.empty(self._shape, dtype=self._dtype, device=self._device)
        self._posted.append(_Posted(tensor, self._transport.recv(tensor, self._peer)))
        self._unposted -= 1

    def receive(self, name: str, microbatch: int, deadline_s: float) -> torch.Tensor:
        """The next message; the caller owns the tensor."""
        tensor, pending = self._posted.popleft()
        if self._unposted:
            self._post()
        with self._tracer.span("receive", name, self._step, microbatch):
            pending.wait(deadline_s)
        return tensor
