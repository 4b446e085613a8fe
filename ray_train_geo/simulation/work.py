"""What there is to simulate: pipelines, and the flows between their stages, as plain values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from ray_train_geo.schedule.actions import Action
from ray_train_geo.schedule.timeline import Hop

__all__ = ["Flow", "PipelineWork"]


@dataclass(frozen=True, slots=True)
class Flow:
    """One directed hop and what it carries: messages of one size, one behind the other.

    Args:
        latency_s: one way; a message arrives that much after its last byte has left.
        size_bytes: of each message.
        seconds_per_byte: what the hop's link alone needs; 0 is no limit.
        resources: numbers of what it shares with other flows (NICs, uplinks), each once.
        cold_s: what the slow start of its connection adds to the first message.

    Raises:
        ValueError: a figure that is negative or not finite, or a resource that is named twice.
    """

    latency_s: float
    size_bytes: float
    seconds_per_byte: float
    resources: tuple[int, ...] = ()
    cold_s: float = 0.0

    def __post_init__(self) -> None:
        # `inf` as a seconds_per_byte is how a link table says that there is no such link.
        for figure in (self.latency_s, self.size_bytes, self.seconds_per_byte, self.cold_s):
            if not 0 <= figure < math.inf:
                raise ValueError(f"a flow needs finite figures, none below 0: {self}")
        if len(set(self.resources)) != len(self.resources):
            raise ValueError(f"a flow names a resource twice: {self}")

    @property
    def hop(self) -> Hop:
        """This flow where it shares nothing."""
        return Hop(self.latency_s, self.size_bytes * self.seconds_per_byte, self.cold_s)


@dataclass(frozen=True, slots=True)
class PipelineWork:
    """What one pipeline has to do in a step.

    Args:
        actions: ``[stages][any]``; each stage's schedule.
        forward_s, backward_s: ``[stages]``; seconds of one microbatch.
        down: ``[stages - 1]``; activations from stage ``s`` to ``s + 1``.
        up: ``[stages - 1]``; gradients from stage ``s + 1`` to ``s``.
        pace: ``[stages][any]``; each action takes that many times its stage's seconds (jitter, a
            straggler); None: once.
        blocking_sends: a stage does nothing until the message that it sends has left.
        weight_s: ``[stages]``; seconds of one microbatch's W; None: a B is a whole backward.
        traffic_slowdown: seconds that a stage's F or B takes longer for each second that a message
            into it, or out of it, is on its way: what messages take of who computes.
        microbatches: how many messages each flow carries.
    """

    actions: Sequence[Sequence[Action]]
    forward_s: tuple[float, ...]
    backward_s: tuple[float, ...]
    down: tuple[Flow, ...]
    up: tuple[Flow, ...]
    pace: tuple[tuple[float, ...], ...] | None = None
    blocking_sends: bool = False
    weight_s: tuple[float, ...] | None = None
    traffic_slowdown: float = 0.0
    microbatches: int = field(init=False, compare=False)

    def __post_init__(self) -> None:
        count = sum(a.kind == "F" for a in self.actions[0]) if self.actions else 0
        object.__setattr__(self, "microbatches", count)
        if not 0 <= self.traffic_slowdown < math.inf:
            raise ValueError(f"traffic_slowdown is 0 or more, not {self.traffic_slowdown}")
