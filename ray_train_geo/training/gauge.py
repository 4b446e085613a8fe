"""What a worker measures of itself all the while: its computing, and what its links carry."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field

import torch

from ray_train_geo.planning.slow_links import NodePair, Traffic
from ray_train_geo.schedule.actions import Kind

__all__ = ["Gauge", "Observed", "carried_between"]

_UNREAD = 4096
"""GPU timings that wait to be read: more than any step's actions between two looks."""


@dataclass(frozen=True, slots=True)
class Observed:
    """What a worker measured since it was last asked.

    Args:
        microbatch_s: forward and backward of one, on average; None if none was computed.
        shaped: what simulated links carried from here, by the node that they lead to.
        addresses: what TCP carried from here, by the address of the other end.
    """

    generation: int
    microbatch_s: float | None
    shaped: Mapping[str, Traffic] = field(default_factory=dict)
    addresses: Mapping[str, Traffic] = field(default_factory=dict)


def carried_between(
    seen: Mapping[str, Observed], places: Mapping[str, tuple[str, str]]
) -> dict[NodePair, Traffic]:
    """What the links between nodes carried, by all that workers measured.

    Args:
        seen: by device.
        places: node and address of each device.  Nodes that share an address can't be told apart:
            what went there over TCP is nobody's.
    """
    at: dict[str, set[str]] = {}
    for node, address in places.values():
        at.setdefault(address, set()).add(node)
    found: dict[NodePair, Traffic] = {}
    for device, observed in seen.items():
        here, _ = places[device]
        known = {min(at[a]): t for a, t in observed.addresses.items() if len(at.get(a, ())) == 1}
        for node, traffic in {**known, **observed.shaped}.items():
            if node != here:
                found[here, node] = found.get((here, node), Traffic()) + traffic
    return found


class Gauge:
    """Times the computations of a stage: two looks at a clock each, and two events on a GPU.

    Args:
        inside: what each computation already runs inside of.
        kinds: of computations that a microbatch is made of.
    """

    def __init__(
        self,
        device: torch.device,
        inside: Callable[[Kind], AbstractContextManager[None]],
        kinds: Collection[Kind] = ("F", "B"),
    ) -> None:
        self._kinds = len(set(kinds))
        self._cuda = device.type == "cuda"
        self._inside = inside
        self._lock = threading.Lock()
        self._sums: dict[Kind, tuple[float, int]] = {}
        self._events: deque[tuple[Kind, torch.cuda.Event, torch.cuda.Event]] = deque(maxlen=_UNREAD)

    @contextmanager
    def __call__(self, kind: Kind) -> Iterator[None]:
        if self._cuda:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            with self._inside(kind):
                yield
            end.record()
            self._events.append((kind, start, end))
            return
        start_s = time.perf_counter()
        with self._inside(kind):
            yield
        self._add(kind, time.perf_counter() - start_s)

    def microbatch_s(self) -> float | None:
        """Seconds of a microbatch, forward and backward, on average since the last call.

        None before all their parts were timed; then nothing is forgotten.
        """
        while self._events and self._events[0][2].query():
            kind, start, end = self._events.popleft()
            self._add(kind, start.elapsed_time(end) / 1e3)
        with self._lock:
            if len(self._sums) < self._kinds:
                return None
            sums, self._sums = self._sums, {}
        return sum(seconds / count for seconds, count in sums.values())

    def _add(self, kind: Kind, seconds: float) -> None:
        with self._lock:
            total, count = self._sums.get(kind, (0.0, 0))
            self._sums[kind] = total + seconds, count + 1
