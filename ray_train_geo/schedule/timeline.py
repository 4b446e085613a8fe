"""When each action of one pipeline's step runs: an event simulation.

Compute is one action at a time per stage, in the schedule's order.  A hop is a pipe: messages
enter it one behind the other, ``transfer_s`` each, and arrive ``latency_s`` after they have left::

    stage 0   F0 F1 F2
                \\  \\  \\          sends overlap compute
    stage 1        F0 F1 F2

Each hop has the network to itself here, so a message's arrival is known when it is sent.  For hops
that share what they run over, see :mod:`ray_train_geo.simulation`.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ray_train_geo.schedule.actions import Action, Kind
from ray_train_geo.schedule.pipeline_run import PipelineRun

__all__ = ["Hop", "PrivateWire", "Span", "Timeline", "timeline"]


@dataclass(frozen=True, slots=True)
class Hop:
    """A directed hop, for messages of one size: time on the wire, and time to put one on it.

    Args:
        cold_s: what the slow start of its connection adds to the first message.
    """

    latency_s: float
    transfer_s: float
    cold_s: float = 0.0


class Span(NamedTuple):
    """One action's time.  (A tuple, because a timeline has hundreds of thousands.)"""

    stage: int
    kind: Kind
    microbatch: int
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True)
class Timeline:
    """A simulated step: ``starts_s[s][i]`` and ``ends_s[s][i]`` are of ``actions[s][i]``."""

    actions: tuple[tuple[Action, ...], ...]
    starts_s: tuple[tuple[float, ...], ...]
    ends_s: tuple[tuple[float, ...], ...]

    @classmethod
    def of(cls, run: PipelineRun) -> Timeline:
        """The times of a run that has come to its end.

        Raises:
            ValueError: a deadlock; the message names the stages that are stuck and what they
                wait for.
        """
        stuck = run.stuck()
        if stuck:
            raise ValueError(f"the schedule deadlocks: {', '.join(stuck)}")
        return cls(
            tuple(tuple(todo) for todo in run.actions),
            tuple(tuple(t) for t in run.starts_s),
            tuple(tuple(t) for t in run.ends_s),
        )

    @property
    def makespan_s(self) -> float:
        """From the first forward's start to the end of the last action, in seconds."""
        return max(self.end_s(s) for s in range(len(self.actions)))

    def spans(self) -> Iterator[Span]:
        """All actions with their times, stage by stage, in order."""
        for s, todo in enumerate(self.actions):
            for a, start, end in zip(todo, self.starts_s[s], self.ends_s[s], strict=True):
                yield Span(s, a.kind, a.microbatch, start, end)

    def end_s(self, stage: int) -> float:
        """When ``stage`` is done with its last action."""
        return self.ends_s[stage][-1]

    def last_start_s(self, stage: int) -> float:
        """When ``stage`` begins its last action: gradients become final from here."""
        return self.starts_s[stage][-1]

    def peak_in_flight(self, stage: int) -> int:
        """Most microbatches that ``stage`` holds at once, from F until nothing of them is left."""
        last = "W" if any(a.kind == "W" for a in self.actions[stage]) else "B"
        held = peak = 0
        for action in self.actions[stage]:
            held += (action.kind == "F") - (action.kind == last)
            peak = max(peak, held)
        return peak

    def ascii(self, width: int = 100) -> str:
        """A picture: a row a stage, digits forward, letters backward, capitals W, dots idle.

        A column is ``makespan_s / width`` seconds and shows what runs at its middle; digits are
        the microbatch modulo 10, letters modulo 26.
        """
        column_s = self.makespan_s / width
        rows = []
        for s, todo in enumerate(self.actions):
            cells = []
            for c in range(width):
                t = (c + 0.5) * column_s
                i = bisect_right(self.starts_s[s], t) - 1
                busy = i >= 0 and t < self.ends_s[s][i]
                cells.append(_symbol(todo[i]) if busy else ".")
            rows.append("".join(cells))
        return "\n".join(rows)


def _symbol(action: Action) -> str:
    if action.kind == "F":
        return str(action.microbatch % 10)
    return chr(ord("a" if action.kind == "B" else "A") + action.microbatch % 26)


class PrivateWire:
    """A wire that shares nothing: arrivals follow from what went before."""

    __slots__ = ("_cold_s", "_free_s", "_transfer_s", "latency_s")

    def __init__(self, hop: Hop) -> None:
        self.latency_s = hop.latency_s
        self._transfer_s = hop.transfer_s
        self._cold_s = hop.cold_s  # of the next message
        self._free_s = 0.0  # when it can take the next message

    def send(self, ready_s: float) -> float:
        start = ready_s if ready_s > self._free_s else self._free_s
        self._free_s = start + self._transfer_s + self._cold_s
        self._cold_s = 0.0
        return self._free_s + self.latency_s


def timeline(
    actions: Sequence[Sequence[Action]],
    forward_s: Sequence[float],
    backward_s: Sequence[float],
    forward_hop: Sequence[Hop],
    backward_hop: Sequence[Hop],
    *,
    weight_s: Sequence[float] | None = None,
    pace: Sequence[Sequence[float]] | None = None,
    blocking_sends: bool = False,
) -> Timeline:
    """Simulate one step of one pipeline whose hops share nothing.

    Args:
        actions: ``[stages][any]``; each stage's schedule.
        forward_s, backward_s: ``[stages]``; seconds of one microbatch.
        forward_hop: ``[stages - 1]``; from stage ``s`` to ``s + 1``.
        backward_hop: ``[stages - 1]``; from stage ``s + 1`` to ``s``.
        weight_s, pace, blocking_sends: as :class:`PipelineRun` has them.

    Raises:
        ValueError: lengths that do not match, a stage without actions, or a deadlock; then the
            message names the stages that are stuck and what they wait for.
    """
    down = [PrivateWire(hop) for hop in forward_hop]
    up = [PrivateWire(hop) for hop in backward_hop]
    run = PipelineRun(
        actions,
        forward_s,
        backward_s,
        down,
        up,
        weight_s=weight_s,
        pace=pace,
        blocking_sends=blocking_sends,
    )
    run.run()
    return Timeline.of(run)
