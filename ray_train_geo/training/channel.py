"""One direction of a pipeline edge: messages of one shape, in the schedule's order.

A receiver posts several receives ahead: a message then leaves its sender without first asking
for permission, which on a link between continents would cost a round trip each.

With a codec, what is on the wire is its bytes: the sender encodes before it sends, the receiver
decodes what has come.  Buffers of encoded messages are used again and again.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from ray_train_geo.codecs.base import Codec
from ray_train_geo.codecs.workspace import noise_key
from ray_train_geo.observe.trace import Span, Tracer
from ray_train_geo.transport.base import Pending, Transport

__all__ = ["Coding", "Receiver", "Sender"]


class _Posted(NamedTuple):
    tensor: torch.Tensor
    pending: Pending


@dataclass(frozen=True, slots=True)
class Coding:
    """How a channel's messages are encoded.

    Args:
        codec: for messages of the channel's shape.
        seed: the job's.
        first_microbatch: global index of the pipeline's first.
        boundary: first layer downstream of the channel's edge.
        direction: which of the edge's two channels it is.
    """

    codec: Codec
    seed: int
    first_microbatch: int
    boundary: int
    direction: Literal["down", "up"]

    def key(self, step: int, microbatch: int) -> int:
        """What rounding follows from: whose microbatch it is does not matter, nor which device's.

        Args:
            microbatch: its index in the pipeline.
        """
        index = self.first_microbatch + microbatch
        return noise_key(self.seed, step, index, self.boundary, self.direction)


class Sender:
    """Sends without waiting; :meth:`finish` waits until the peer has everything.

    Args:
        limit: sends under way at a time; one more waits for the oldest. On a link with a long
            round trip it must cover the messages that are in flight.
    """

    def __init__(
        self,
        transport: Transport,
        peer: int,
        tracer: Tracer,
        limit: int,
        coding: Coding | None = None,
    ) -> None:
        self._transport = transport
        self._peer = peer
        self._tracer = tracer
        self._limit = limit
        self._coding = coding
        self._wires: deque[torch.Tensor] = deque()
        self._sent: deque[Pending] = deque()
        self._step = 0
        self._watcher: ThreadPoolExecutor | None = None

    def begin(self, step: int) -> None:
        self._step = step

    def send(self, tensor: torch.Tensor, name: str, microbatch: int, deadline_s: float) -> None:
        """Start sending; ``tensor`` must not change until it has left (or is encoded).

        Args:
            microbatch: its index in the pipeline.
        """
        while len(self._sent) >= self._limit:
            self._sent.popleft().wait(deadline_s)
        start_s = time.time()
        message = tensor.contiguous()
        if self._coding is not None:
            message = self._encoded(self._coding, message, name, microbatch)
        pending = self._transport.send(message, self._peer)
        # On a GPU a wait is for the caller's stream, and the host learns nothing by it.
        if self._tracer.enabled and not tensor.is_cuda:
            pending = self._watched(pending, name, microbatch, start_s, deadline_s)
        self._sent.append(pending)

    def _encoded(
        self, coding: Coding, message: torch.Tensor, name: str, microbatch: int
    ) -> torch.Tensor:
        if len(self._wires) < self._limit:
            size = coding.codec.wire_bytes
            wire = torch.empty(size, dtype=torch.uint8, device=message.device)
        else:
            wire = self._wires.popleft()  # of the oldest message, which has left
        self._wires.append(wire)
        with self._tracer.span("codec", f"encode {name}", self._step, microbatch):
            coding.codec.encode(message, wire, coding.key(self._step, microbatch))
        return wire

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
        coding: Coding | None = None,
    ) -> None:
        self._transport = transport
        self._peer = peer
        self._shape = tuple(shape)
        self._dtype = dtype
        self._device = device
        self._ahead = ahead
        self._tracer = tracer
        self._coding = coding
        self._wires: deque[torch.Tensor] = deque()
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
        tensor = self._buffer() if self._coding is None else self._wire(self._coding)
        self._posted.append(_Posted(tensor, self._transport.recv(tensor, self._peer)))
        self._unposted -= 1

    def _buffer(self) -> torch.Tensor:
        return torch.empty(self._shape, dtype=self._dtype, device=self._device)

    def _wire(self, coding: Coding) -> torch.Tensor:
        if self._wires:
            return self._wires.popleft()
        return torch.empty(coding.codec.wire_bytes, dtype=torch.uint8, device=self._device)

    def receive(self, name: str, microbatch: int, deadline_s: float) -> torch.Tensor:
        """The next message; the caller owns the tensor."""
        tensor, pending = self._posted.popleft()
        if self._unposted:
            self._post()
        with self._tracer.span("receive", name, self._step, microbatch):
            pending.wait(deadline_s)
        if self._coding is None:
            return tensor
        message = self._buffer()
        with self._tracer.span("codec", f"decode {name}", self._step, microbatch):
            self._coding.codec.decode(tensor, message, self._coding.key(self._step, microbatch))
        self._wires.append(tensor)
        return message
