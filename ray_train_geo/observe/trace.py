"""Where a step's time goes: spans recorded by each worker, merged into one Chrome trace (level 0).

``trace.json`` opens in https://ui.perfetto.dev and in chrome://tracing.  A worker is a process
(pid = rank); its threads are lanes:

    rank 1   compute  |F0|F1|B0|F2|B1|...|opt|
             receive  |F0|F1|   |F2|
             send        |F0|  |B0|
             sync                     |layers|

Format: "Trace Event Format", Google, 2016 (complete events ``X`` and metadata events ``M``).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal

from ray_train_geo.observe.phases import PhasePage

__all__ = ["Category", "Span", "Tracer", "chrome_trace", "worker_name"]

Category = Literal[
    "forward", "backward", "weights", "codec", "send", "receive", "sync", "optimizer"
]

_LANES: dict[str, str] = {
    "forward": "compute",
    "backward": "compute",
    "weights": "compute",
    "codec": "compute",
    "optimizer": "compute",
    "receive": "receive",
    "send": "send",
    "sync": "sync",
}
_LANE_ORDER = ("compute", "receive", "send", "sync")
_TIDS_PER_LANE = 100
_OFF: AbstractContextManager[None] = nullcontext()


@dataclass(frozen=True, slots=True)
class Span:
    """One piece of work of one worker; ``start_s`` is in unix seconds of that worker's clock."""

    category: Category
    name: str
    start_s: float
    duration_s: float
    step: int
    microbatch: int | None = None


class Tracer:
    """Records spans; one per worker, used from any of its threads.

    Times are the host's: on a GPU a span covers the launch of its kernels, unless the caller
    synchronises before it ends or hands in device-timed spans by :meth:`add`.  While ``enabled``
    is false, :meth:`span` costs two attribute look-ups and one shared object.

    Args:
        phases: is told of what begins, whether spans are recorded or not.
    """

    __slots__ = ("_offset_s", "_phases", "_spans", "enabled")

    def __init__(self, enabled: bool = True, phases: PhasePage | None = None) -> None:
        self.enabled = enabled
        self._phases = phases
        self._spans: deque[Span] = deque()
        # Durations come from the monotonic clock: the wall clock may jump (NTP) within a run.
        self._offset_s = time.time() - time.perf_counter()

    def span(
        self, category: Category, name: str, step: int, microbatch: int | None = None
    ) -> AbstractContextManager[None]:
        """A context manager that records what runs inside it (also if that raises)."""
        if self._phases is not None:
            self._phases.enter(category)
        return _Running(self, category, name, step, microbatch) if self.enabled else _OFF

    def add(self, span: Span) -> None:
        """Record a span that was timed elsewhere."""
        if self.enabled:
            self._spans.append(span)

    def drain(self) -> list[Span]:
        """Hand over all spans that have ended, in the order in which they ended, and forget them.

        Spans that end meanwhile, in other threads, are in this call's list or in the next one's.
        """
        return [self._spans.popleft() for _ in range(len(self._spans))]


class _Running(AbstractContextManager[None]):
    __slots__ = ("_args", "_start_s", "_tracer")

    def __init__(
        self, tracer: Tracer, category: Category, name: str, step: int, microbatch: int | None
    ) -> None:
        self._tracer = tracer
        self._args = (category, name, step, microbatch)

    def __enter__(self) -> None:
        self._start_s = time.perf_counter()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        end_s, (category, name, step, microbatch) = time.perf_counter(), self._args
        start_s = self._start_s
        self._tracer._spans.append(
            Span(
                category, name, self._tracer._offset_s + start_s, end_s - start_s, step, microbatch
            )
        )


def worker_name(rank: int, pipeline: int, stage: int, layers: tuple[int, int], node: str) -> str:
    """A worker's name in the trace: ``rank 1: pipeline 0, stage 1, layers 2-3, node X``.

    Args:
        layers: ``(first, last_exclusive)``.
    """
    first, last = layers[0], layers[1] - 1
    held = f"layer {first}" if first == last else f"layers {first}-{last}"
    return f"rank {rank}: pipeline {pipeline}, stage {stage}, {held}, node {node}"


def chrome_trace(workers: Mapping[int, tuple[str, Sequence[Span]]]) -> dict[str, Any]:
    """Merge all workers' spans into the JSON object of a Chrome trace.

    Spans of one lane that overlap without one holding the other (two sends in flight) go to
    lanes of their own, ``send 2`` and so on, for viewers need proper nesting within a thread.
    Workers' clocks are taken as they are: across nodes they differ by what NTP leaves.

    Args:
        workers: rank -> (name, see :func:`worker_name`; spans in any order).

    Returns:
        ``{"traceEvents": [...], "displayTimeUnit": "ms"}``; ``ts`` and ``dur`` are in whole
        microseconds from the first span of all.
    """
    origin_s = min((s.start_s for _, spans in workers.values() for s in spans), default=0.0)
    events: list[dict[str, Any]] = []
    for rank, (name, spans) in sorted(workers.items()):
        events.append(_metadata("process_name", rank, 0, name=name))
        events.append(_metadata("process_sort_index", rank, 0, sort_index=rank))
        for i, lane in enumerate(_LANE_ORDER):
            mine = [s for s in spans if _LANES[s.category] == lane]
            for j, track in enumerate(_tracks(mine, origin_s)):
                tid = i * _TIDS_PER_LANE + j
                label = lane if j == 0 else f"{lane} {j + 1}"
                events.append(_metadata("thread_name", rank, tid, name=label))
                events.append(_metadata("thread_sort_index", rank, tid, sort_index=tid))
                events.extend(_complete(span, rank, tid, a, b) for span, a, b in track)
    return {"traceEvents": events, "displayTimeUnit": "ms"}


@dataclass(slots=True)
class _Track:
    """One thread of the trace while it is filled, in the order of starts; times in us."""

    placed: list[tuple[Span, int, int]] = field(default_factory=list)
    open_ends: list[int] = field(default_factory=list)  # spans still open, outermost first
    floor_us: int = 0  # nothing may start before

    def place(self, span: Span, start_us: int, end_us: int) -> bool:
        """Add ``span`` if it stays well nested."""
        # Unix seconds in a double resolve 0.24 us: neighbours may seem to overlap by 1 us.
        while self.open_ends and self.open_ends[-1] <= start_us + 1:
            self.floor_us = max(self.floor_us, self.open_ends.pop())
        if self.open_ends and end_us > self.open_ends[-1]:
            return False
        start_us = max(start_us, self.floor_us)
        end_us = max(end_us, start_us)
        self.floor_us = start_us
        self.open_ends.append(end_us)
        self.placed.append((span, start_us, end_us))
        return True


def _tracks(spans: Sequence[Span], origin_s: float) -> list[list[tuple[Span, int, int]]]:
    """Spread ``spans`` with their starts and ends (us) over as few tracks as greed finds.

    There is always one, so that each lane shows.
    """
    timed = []
    for span in spans:
        start_us = round((span.start_s - origin_s) * 1e6)
        timed.append((span, start_us, start_us + max(round(span.duration_s * 1e6), 0)))
    timed.sort(key=lambda t: (t[1], -t[2]))
    tracks = [_Track()]
    for span, start_us, end_us in timed:
        if not any(track.place(span, start_us, end_us) for track in tracks):
            tracks.append(_Track())
            tracks[-1].place(span, start_us, end_us)
    return [track.placed for track in tracks]


def _complete(span: Span, rank: int, tid: int, start_us: int, end_us: int) -> dict[str, Any]:
    args: dict[str, Any] = {"step": span.step}
    if span.microbatch is not None:
        args["microbatch"] = span.microbatch
    return {
        "ph": "X",
        "name": span.name,
        "cat": span.category,
        "pid": rank,
        "tid": tid,
        "ts": start_us,
        "dur": end_us - start_us,
        "args": args,
    }


def _metadata(kind: str, rank: int, tid: int, **args: Any) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": rank, "tid": tid, "args": args}
