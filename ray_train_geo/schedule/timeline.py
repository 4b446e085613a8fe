"""When each action of one pipeline's step runs: an event simulation.

Compute is one action at a time per stage, in the schedule's order.  A hop is a pipe: messages
enter it one behind the other, ``transfer_s`` each, and arrive ``latency_s`` after they have left::

    stage 0   F0 F1 F2
                \\  \\  \\          sends overlap compute
    stage 1        F0 F1 F2

An action starts when its stage is free and its input has come: F needs the activations of the
stage above, B the gradients of the stage below (on the last stage: its own F).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ray_train_geo.schedule.actions import Action, Kind

__all__ = ["Hop", "Span", "Timeline", "timeline"]


@dataclass(frozen=True, slots=True)
class Hop:
    """A directed hop, for messages of one size: time on the wire, and time to put one on it."""

    latency_s: float
    transfer_s: float


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

    @property
    def makespan_s(self) -> float:
        """From the first forward's start to the last backward's end, in seconds."""
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
        """When ``stage`` begins its last action (a backward: gradients become final from here)."""
        return self.starts_s[stage][-1]

    def peak_in_flight(self, stage: int) -> int:
        """Most microbatches whose activations ``stage`` holds at once."""
        held = peak = 0
        for action in self.actions[stage]:
            held += 1 if action.kind == "F" else -1
            peak = max(peak, held)
        return peak

    def ascii(self, width: int = 100) -> str:
        """A picture: a row a stage, digits forward, letters backward, dots idle.

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
    return chr(ord("a") + action.microbatch % 26)


def timeline(
    actions: Sequence[Sequence[Action]],
    forward_s: Sequence[float],
    backward_s: Sequence[float],
    forward_hop: Sequence[Hop],
    backward_hop: Sequence[Hop],
) -> Timeline:
    """Simulate one step of one pipeline.

    Args:
        actions: ``[stages][any]``; each stage's schedule.
        forward_s, backward_s: ``[stages]``; seconds of one microbatch.
        forward_hop: ``[stages - 1]``; from stage ``s`` to ``s + 1``.
        backward_hop: ``[stages - 1]``; from stage ``s + 1`` to ``s``.

    Raises:
        ValueError: lengths that do not match, a stage without actions, or a deadlock; then the
            message names the stages that are stuck and what they wait for.
    """
    stages = len(actions)
    if not (stages == len(forward_s) == len(backward_s)) or not all(actions):
        raise ValueError(f"forward_s, backward_s and actions are needed for all {stages} stages")
    if not (stages - 1 == len(forward_hop) == len(backward_hop)):
        raise ValueError(f"{stages} stages have {stages - 1} hops in each direction")
    last = stages - 1
    count = 1 + max(a.microbatch for todo in actions for a in todo)
    # When the input of F (of B) on a stage arrives; None: not sent yet.
    activations: list[list[float | None]] = [[None] * count for _ in range(stages)]
    gradients: list[list[float | None]] = [[None] * count for _ in range(stages)]
    activations[0] = [0.0] * count
    starts: list[list[float]] = [[] for _ in range(stages)]
    ends: list[list[float]] = [[] for _ in range(stages)]
    down_free_s = [0.0] * stages  # when the hop below can take the next message
    up_free_s = [0.0] * stages

    # Run a stage until it waits; whoever got a message from it is looked at (again).  The result
    # does not depend on the order: all messages of a hop are of one stage, in that stage's order.
    queued = [True] * stages
    todo_stages = list(reversed(range(stages)))
    while todo_stages:
        s = todo_stages.pop()
        queued[s] = False
        now = ends[s][-1] if ends[s] else 0.0
        sent_down = sent_up = False
        for action in actions[s][len(ends[s]) :]:
            m = action.microbatch
            forward = action.kind == "F"
            arrival = activations[s][m] if forward else gradients[s][m]
            if arrival is None:
                break
            start = arrival if arrival > now else now
            now = start + (forward_s[s] if forward else backward_s[s])
            starts[s].append(start)
            ends[s].append(now)
            if forward:
                if s == last:
                    gradients[s][m] = now
                    continue
                hop = forward_hop[s]
                down_free_s[s] = max(now, down_free_s[s]) + hop.transfer_s
                activations[s + 1][m] = down_free_s[s] + hop.latency_s
                sent_down = True
            elif s > 0:
                hop = backward_hop[s - 1]
                up_free_s[s] = max(now, up_free_s[s]) + hop.transfer_s
                gradients[s - 1][m] = up_free_s[s] + hop.latency_s
                sent_up = True
        for neighbour, sent in ((s + 1, sent_down), (s - 1, sent_up)):
            if sent and not queued[neighbour]:
                queued[neighbour] = True
                todo_stages.append(neighbour)

    stuck = [
        f"stage {s} waits at {actions[s][len(ends[s])]}"
        for s in range(stages)
        if len(ends[s]) < len(actions[s])
    ]
    if stuck:
        raise ValueError(f"the schedule deadlocks: {', '.join(stuck)}")
    return Timeline(
        tuple(tuple(todo) for todo in actions),
        tuple(tuple(t) for t in starts),
        tuple(tuple(t) for t in ends),
    )
