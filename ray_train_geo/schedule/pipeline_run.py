"""What the stages of one pipeline do as messages reach them, whatever carries the messages.

An action starts when its stage is free and its input has come: F needs the activations of the
stage above, B the gradients of the stage below (on the last stage: its own F).  W needs nothing
but its own B, which comes before it in the stage's schedule.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from ray_train_geo.schedule.actions import Action

__all__ = ["PipelineRun", "Wire"]


class Wire(Protocol):
    """What carries the messages of one directed hop, in the order in which they are sent.

    Attributes:
        latency_s: a message arrives that much after its last byte has left.
    """

    @property
    def latency_s(self) -> float: ...

    def send(self, ready_s: float) -> float:
        """Take a message that exists from ``ready_s`` on; returns when it arrives."""


class PipelineRun:
    """The stages of one pipeline, each as far in its schedule as its messages let it.

    A stage runs ahead of all others until it needs a message that was not sent yet: when an
    action starts depends on the stage's earlier actions and on arrivals, on nothing else.

    ``starts_s[s][i]`` and ``ends_s[s][i]`` are of ``actions[s][i]``, as far as the stage has come.

    Args:
        actions: ``[stages][any]``; each stage's schedule.
        forward_s, backward_s: ``[stages]``; seconds of one microbatch.
        down: ``[stages - 1]``; from stage ``s`` to ``s + 1``.
        up: ``[stages - 1]``; from stage ``s + 1`` to ``s``.
        weight_s: ``[stages]``; as ``backward_s``, where weight gradients are actions of their own.
        pace: ``[stages][any]``; each action takes that many times its stage's seconds.
        blocking_sends: a stage does nothing until the message that it sends has left.

    Raises:
        ValueError: lengths that do not match, or a stage without actions.
    """

    def __init__(
        self,
        actions: Sequence[Sequence[Action]],
        forward_s: Sequence[float],
        backward_s: Sequence[float],
        down: Sequence[Wire],
        up: Sequence[Wire],
        *,
        weight_s: Sequence[float] | None = None,
        pace: Sequence[Sequence[float]] | None = None,
        blocking_sends: bool = False,
    ) -> None:
        stages = len(actions)
        whole = [0.0] * stages if weight_s is None else weight_s
        if not (stages == len(forward_s) == len(backward_s) == len(whole)) or not all(actions):
            raise ValueError(
                f"forward_s, backward_s (weight_s) and actions are needed for all {stages} stages"
            )
        if weight_s is None and any(a.kind == "W" for todo in actions for a in todo):
            raise ValueError("weight_s is needed: the schedule has weight gradients of their own")
        if not (stages - 1 == len(down) == len(up)):
            raise ValueError(f"{stages} stages have {stages - 1} hops in each direction")
        if pace is not None and [len(p) for p in pace] != [len(todo) for todo in actions]:
            raise ValueError("pace is needed for every action")
        count = 1 + max(a.microbatch for todo in actions for a in todo)
        self.actions = actions
        self._compute_s = []
        for todo, *each_s in zip(actions, forward_s, backward_s, whole, strict=True):
            seconds_of = dict(zip("FBW", each_s, strict=True))
            self._compute_s.append([seconds_of[a.kind] for a in todo])
        if pace is not None:
            self._compute_s = [
                [seconds * factor for seconds, factor in zip(*both, strict=True)]
                for both in zip(self._compute_s, pace, strict=True)
            ]
        self._down, self._up = down, up
        self._blocking_sends = blocking_sends
        # When a stage can do its next action.
        self._free_s = [0.0] * stages
        # When the input of F (of B) on a stage arrives; None: not known yet.
        self._activations: list[list[float | None]] = [[None] * count for _ in range(stages)]
        self._gradients: list[list[float | None]] = [[None] * count for _ in range(stages)]
        self._activations[0] = [0.0] * count
        self.starts_s: list[list[float]] = [[] for _ in range(stages)]
        self.ends_s: list[list[float]] = [[] for _ in range(stages)]

    def run(self) -> None:
        """Let all stages run, to the end or to where they wait for one another for ever."""
        # Whoever got a message is looked at (again).  The result does not depend on the order:
        # all messages of a hop are of one stage, in that stage's order.
        stages = list(reversed(range(len(self.actions))))
        while stages:
            s = stages.pop()
            for neighbour in self._run_stage(s):
                if neighbour not in stages:
                    stages.append(neighbour)

    def _run_stage(self, s: int) -> list[int]:
        """Run a stage until it waits; returns the stages that got a message."""
        now = self._free_s[s]
        todo, starts, ends = self.actions[s], self.starts_s[s], self.ends_s[s]
        activations, gradients = self._activations[s], self._gradients[s]
        compute_s, blocking = self._compute_s[s], self._blocking_sends
        last = s == len(self.actions) - 1
        sent_down = sent_up = False
        for i in range(len(ends), len(todo)):
            action = todo[i]
            if action.kind == "W":
                starts.append(now)
                now += compute_s[i]
                ends.append(now)
                continue
            m = action.microbatch
            forward = action.kind == "F"
            needed = activations[m] if forward else gradients[m]
            if needed is None:
                break
            start = needed if needed > now else now
            now = start + compute_s[i]
            starts.append(start)
            ends.append(now)
            if forward:
                if last:
                    gradients[m] = now
                    continue
                wire = self._down[s]
                self._activations[s + 1][m] = arrival = wire.send(now)
                sent_down = True
            elif s > 0:
                wire = self._up[s - 1]
                self._gradients[s - 1][m] = arrival = wire.send(now)
                sent_up = True
            else:
                continue
            if blocking:
                now = arrival - wire.latency_s
        self._free_s[s] = now
        reached = []
        if sent_down:
            reached.append(s + 1)
        if sent_up:
            reached.append(s - 1)
        return reached

    def stuck(self) -> list[str]:
        """What the stages that have not done all of their actions wait for."""
        return [
            f"stage {s} waits at {todo[len(self.ends_s[s])]}"
            for s, todo in enumerate(self.actions)
            if len(self.ends_s[s]) < len(todo)
        ]
