"""Groups of ranks that are threads of one process: messages arrive at once."""

from __future__ import annotations

import threading

import torch

from ray_train_geo.errors import AbortedError, DeadlineError
from ray_train_geo.transport import collectives
from ray_train_geo.transport.base import Pending


class Line:
    """Messages from one rank to another: the first receive that is posted gets the first."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.messages: list[torch.Tensor] = []
        self.posted = 0
        self.aborted = False


class MemoryTransport:
    """One rank's messages; collectives are built upon them by whoever wraps it."""

    def __init__(self, rank: int, size: int, lines: dict[tuple[int, int], Line]) -> None:
        self.rank, self.size, self.closed = rank, size, False
        self._lines = lines

    def send(self, tensor: torch.Tensor, peer: int) -> Pending:
        line = self._lines[self.rank, peer]
        with line.changed:
            line.messages.append(tensor.clone())
            line.changed.notify_all()
        return collectives.Together(())

    def recv(self, tensor: torch.Tensor, peer: int) -> Pending:
        return Arrival(self._lines[peer, self.rank], tensor)

    def synchronize(self, timeout_s: float) -> None: ...

    def abort(self) -> None:
        for line in self._lines.values():
            with line.changed:
                line.aborted = True
                line.changed.notify_all()

    def close(self) -> None:
        self.closed = True


class Arrival:
    def __init__(self, line: Line, tensor: torch.Tensor) -> None:
        self._line, self._tensor = line, tensor
        with line.changed:
            self._number = line.posted
            line.posted += 1

    def wait(self, timeout_s: float) -> None:
        line, number = self._line, self._number
        with line.changed:
            there = line.changed.wait_for(
                lambda: len(line.messages) > number or line.aborted, timeout_s
            )
            if not there:
                raise DeadlineError("nothing came")
            if len(line.messages) <= number:
                raise AbortedError("aborted")
            self._tensor.copy_(line.messages[number])


def memory_group(size: int) -> list[MemoryTransport]:
    lines = {(a, b): Line() for a in range(size) for b in range(size)}
    return [MemoryTransport(rank, size, lines) for rank in range(size)]
