"""What became of every device-second: the one place where a replay counts.

::

    |<-------- training: whole steps commit -------->|<- stopped ->|<- waiting ->|
    [step][step][step][save][step][step][st|
                                            ^ interrupted: this step is lost, and whatever
                                              committed steps are rolled back as well

Steps are not played one by one: a span of training is so many of them, by division.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from ray_train_geo.replay.fleet import Fleet

__all__ = ["Ledger", "Span", "SpanKind"]

SpanKind = Literal["training", "stopped", "waiting"]

_SLACK = 1e-6
"""Of a step: moments are sums of floats, and the end of a step must not fall short of itself."""


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of time in which one plan trains, or the job is stopped, or waits for devices.

    Args:
        devices: that train.
        step_s: of the plan.
        steps_per_save, save_s: after so many steps training stops for so long; 0 is never.
        undone: whole steps that were rolled back later.
    """

    kind: SpanKind
    start_s: float
    end_s: float = math.inf
    devices: int = 0
    step_s: float = math.inf
    steps_per_save: int = 0
    save_s: float = 0.0
    undone: int = 0

    @property
    def seconds(self) -> float:
        return self.end_s - self.start_s

    @property
    def _cycle_s(self) -> float:
        """From one checkpoint to the next."""
        return self.steps_per_save * self.step_s + self.save_s

    def _whole(self, seconds: float) -> tuple[int, float]:
        """Whole cycles that fit in, and what is left."""
        if self.kind != "training" or not self.steps_per_save:
            return 0, seconds
        cycles = math.floor(seconds / self._cycle_s + _SLACK)
        return cycles, max(0.0, seconds - cycles * self._cycle_s)

    def done_by(self, time_s: float) -> int:
        """Whole steps from the start until then, whatever became of them."""
        if self.kind != "training" or time_s <= self.start_s:
            return 0
        cycles, rest_s = self._whole(time_s - self.start_s)
        steps = math.floor(rest_s / self.step_s + _SLACK)
        if self.steps_per_save:
            steps = min(steps, self.steps_per_save)
        return cycles * self.steps_per_save + steps

    @property
    def steps(self) -> int:
        """Committed, and never rolled back."""
        return self.done_by(self.end_s) - self.undone

    @property
    def unsaved(self) -> int:
        """Whole steps since the last complete checkpoint, or since the start."""
        return self.done_by(self.end_s) - self._whole(self.seconds)[0] * self.steps_per_save

    @property
    def saving_s(self) -> float:
        """How long training was stopped for checkpoints, incomplete ones included."""
        if not self.steps_per_save:
            return 0.0
        cycles, rest_s = self._whole(self.seconds)
        return cycles * self.save_s + max(0.0, rest_s - self.steps_per_save * self.step_s)

    @property
    def productive_s(self) -> float:
        return self.steps * self.step_s if self.kind == "training" else 0.0

    @property
    def lost_s(self) -> float:
        """On steps that were rolled back, and on the one that was under way at the end."""
        if self.kind != "training":
            return 0.0
        return max(0.0, self.seconds - self.productive_s - self.saving_s)

    @property
    def cut_off(self) -> bool:
        """Whether a step was under way at the end."""
        left_s = self.lost_s - self.undone * self.step_s
        return self.kind == "training" and left_s > _SLACK * self.step_s


class Ledger:
    """Writes down what a policy does with a fleet, moment by moment."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self._spans: list[Span] = [Span("waiting", 0.0)]

    @property
    def spans(self) -> Sequence[Span]:
        """In the order of time, without gaps; the last one is open until :meth:`end`."""
        return self._spans

    @property
    def training(self) -> bool:
        return self._spans[-1].kind == "training"

    def train(
        self,
        now_s: float,
        devices: int,
        step_s: float,
        steps_per_save: int = 0,
        save_s: float = 0.0,
    ) -> None:
        """A plan starts with a new step."""
        self._begin(Span("training", now_s, math.inf, devices, step_s, steps_per_save, save_s))

    def stop(self, now_s: float, to_checkpoint: bool = False) -> None:
        """Training stops, or goes on being stopped; a step that is under way is lost.

        Args:
            to_checkpoint: so are all steps since the last complete checkpoint of the plan in force.
        """
        self._begin(Span("stopped", now_s), to_checkpoint)

    def wait(self, now_s: float) -> None:
        """There are too few devices."""
        self._begin(Span("waiting", now_s))

    def end(self, now_s: float) -> None:
        """Nothing happens any more."""
        self._close(now_s)

    def step_end(self, time_s: float) -> float:
        """When the step that is under way then is complete."""
        span = self._spans[-1]
        steps = math.ceil((time_s - span.start_s) / span.step_s - _SLACK)
        return span.start_s + max(0, steps) * span.step_s

    def save_end(self, time_s: float) -> float:
        """When the next checkpoint is complete."""
        span = self._spans[-1]
        cycle_s = span.steps_per_save * span.step_s + span.save_s
        cycles = math.ceil((time_s - span.start_s) / cycle_s - _SLACK)
        return span.start_s + max(1, cycles) * cycle_s

    def committed_by(self, time_s: float) -> int:
        """Steps that had been committed by then, and still are."""
        return sum(min(s.done_by(min(time_s, s.end_s)), s.steps) for s in self._spans)

    def roll_back(self, steps: int) -> None:
        """The last ``steps`` committed ones are undone; the open span must not be training."""
        for i in reversed(range(len(self._spans))):
            span = self._spans[i]
            if steps <= 0:
                return
            if span.kind == "training":
                undone = min(steps, span.steps)
                self._spans[i] = replace(span, undone=span.undone + undone)
                steps -= undone

    def _begin(self, span: Span, to_checkpoint: bool = False) -> None:
        self._close(span.start_s, to_checkpoint)
        self._spans.append(span)

    def _close(self, now_s: float, to_checkpoint: bool = False) -> None:
        last = self._spans.pop()
        if now_s > last.start_s:
            closed = replace(last, end_s=now_s)
            self._spans.append(replace(closed, undone=closed.unsaved) if to_checkpoint else closed)
