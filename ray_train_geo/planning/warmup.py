"""How many forwards each stage of a pipeline runs before its first backward.

Between a stage's first forward and its first backward lies the round trip of one microbatch
through all that is below it; the stage fills that time with its warmup forwards, and is idle for
what they leave.  At the end of the step the same round trip lies between its last forward and its
last backward, filled with as many backwards::

    stage s   F F F . . . . . B F B F B ... F B F B . . B . . B        w = 3
              |<- round trip ->|                |<- round trip ->|

So a far pipeline wants more warmup than its steady state needs, and memory limits it.  In the
steady state the round trip between any two stages ``s < t`` must fit into ``w_s - w_t + 1``
periods, because F and B take strict turns: warmup must fall along the pipeline, and by more over
long hops.

Where weight gradients are computed apart (zero-bubble), they fill the second wait, and only the
first one asks for more warmup.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from ray_train_geo.schedule.one_f_one_b import warmup_forwards
from ray_train_geo.schedule.timeline import Hop

__all__ = ["StageTimes", "choose_warmup"]


@dataclass(frozen=True)
class StageTimes:
    """What one microbatch takes on each stage and hop of a pipeline, in seconds.

    Args:
        forward_s, backward_s: ``[stages]``.
        down, up: ``[stages - 1]``; hops of activations and of gradients.
        weight_s: ``[stages]``; zero-bubble: of W, which a backward is then without.
    """

    forward_s: tuple[float, ...]
    backward_s: tuple[float, ...]
    down: tuple[Hop, ...]
    up: tuple[Hop, ...]
    weight_s: tuple[float, ...] | None = None

    @cached_property
    def whole_backward_s(self) -> tuple[float, ...]:
        """``[stages]``; B, and W if it is apart."""
        if self.weight_s is None:
            return self.backward_s
        return tuple(b + w for b, w in zip(self.backward_s, self.weight_s, strict=True))

    @property
    def last_s(self) -> tuple[float, ...]:
        """``[stages]``; a stage's last action, from whose start on its gradients are final."""
        return self.backward_s if self.weight_s is None else self.weight_s

    @cached_property
    def work_s(self) -> list[float]:
        """``[stages]``; all that a stage computes."""
        return [f + b for f, b in zip(self.forward_s, self.whole_backward_s, strict=True)]

    @cached_property
    def head_s(self) -> list[float]:
        """``[stages]``; from the start to the first forward that comes to a stage."""
        found = [0.0]
        for f, hop in zip(self.forward_s, self.down, strict=False):
            found.append(found[-1] + f + hop.transfer_s + hop.latency_s)
        return found

    @cached_property
    def tail_s(self) -> list[float]:
        """``[stages]``; from the end of a stage's last backward to the end of all."""
        found = [0.0]
        for b, hop in zip(self.backward_s, self.up, strict=False):
            found.append(found[-1] + b + hop.transfer_s + hop.latency_s)
        return found

    @cached_property
    def round_s(self) -> float:
        """One microbatch alone, down and up."""
        return self.head_s[-1] + self.forward_s[-1] + self.tail_s[-1] + self.backward_s[-1]

    @cached_property
    def below_s(self) -> list[float]:
        """``[stages]``; from the end of a forward to the start of its backward."""
        whole = self.round_s
        return [
            whole - head - tail - f - b
            for head, tail, f, b in zip(
                self.head_s, self.tail_s, self.forward_s, self.backward_s, strict=True
            )
        ]

    @cached_property
    def paces_s(self) -> list[tuple[float, float]]:
        """``[stages]``; seconds from one warmup forward to the next, and between last backwards.

        A stage is no faster than what feeds it: forwards come from above, gradients from below.
        """
        stages = len(self.forward_s)
        forward, backward = list(self.forward_s), list(self.backward_s)
        for s in range(1, stages):
            forward[s] = max(forward[s], forward[s - 1], self.down[s - 1].transfer_s)
            t = stages - 1 - s
            backward[t] = max(backward[t], backward[t + 1], self.up[t].transfer_s)
        return list(zip(forward, backward, strict=True))

    def idle_s(self, warmup: Sequence[int]) -> list[float]:
        """``[stages]``; what the warmup leaves of the round trips at the step's two ends.

        W, where it is apart, fills the second one.
        """
        return [
            max(0.0, below - w * f) + (max(0.0, below - w * b) if self.weight_s is None else 0.0)
            for below, w, (f, b) in zip(self.below_s, warmup, self.paces_s, strict=True)
        ]

    def turns(self, warmup: Sequence[int], microbatches: int) -> tuple[float, float]:
        """What strict turns of F and B ask for: ``(intercept_s, slope_s)`` of the makespan.

        Stage ``s`` runs its last forward after its ``(M - 2 - w_s)``-th backward, and its last
        backward a round trip after that; from one backward to the next it takes a period.  A
        stage that has all forwards before it runs a backward takes no turns.

        Of all pairs of stages the one that costs most for so many microbatches.
        """
        ends = [h + t for h, t in zip(self.head_s, self.tail_s, strict=True)]
        through = [
            end + f + b for end, f, b in zip(ends, self.forward_s, self.backward_s, strict=True)
        ]
        best, worst_s = (self.round_s, 0.0), self.round_s
        for s, (end, held) in enumerate(zip(ends, warmup, strict=True)):
            if held >= microbatches - 1:
                continue
            for t in range(s, len(ends)):
                around = through[t] - end
                period = around / (held - warmup[t] + 1)
                intercept = end + around - (1 + warmup[t]) * period
                if intercept + period * microbatches > worst_s:
                    best, worst_s = (intercept, period), intercept + period * microbatches
        return best


def choose_warmup(
    times: StageTimes, microbatches: int, room: Sequence[int], extra: int | None
) -> tuple[int, ...]:
    """The smallest warmup that costs no time, as far as memory allows.

    From what keeps the steady state busy (:func:`warmup_forwards`) up to where no stage is idle
    for longer than another part of the pipeline works anyway.

    Args:
        room: ``[stages]``; microbatches that each stage has memory for, at least 1.
        extra: as :func:`warmup_forwards`; then nothing is added.
    """
    stages = len(times.forward_s)
    hop_s = [
        (a.latency_s + a.transfer_s + b.latency_s + b.transfer_s) / 2
        for a, b in zip(times.down, times.up, strict=True)
    ]
    free = [microbatches] * stages
    usual = warmup_forwards(
        stages, microbatches, hop_s, times.forward_s, times.whole_backward_s, free, extra
    )
    wanted = usual if extra is not None else _lengthened(times, microbatches, usual)
    limit = microbatches - 1
    warmup = []
    for want, most in zip(wanted, room, strict=True):
        warmup.append(min(want, limit, most - 1))
        limit = max(0, warmup[-1] - 1)
    return tuple(warmup)


def _lengthened(times: StageTimes, microbatches: int, usual: Sequence[int]) -> list[int]:
    """``usual``, with as much more as keeps stages from idling at the step's ends.

    No stage needs to be faster than the slowest part of the pipeline.  Where W is apart, it fills
    the step's end and the way of the last gradients.
    """
    split = times.weight_s is not None
    busy = [
        head + (0.0 if split else tail) + microbatches * work
        for head, tail, work in zip(times.head_s, times.tail_s, times.work_s, strict=True)
    ]
    slowest_hop = max((hop.transfer_s for hop in (*times.down, *times.up)), default=0.0)
    goal = max(*busy, times.round_s + (microbatches - 1) * slowest_hop)
    below, paces, wanted = times.below_s, times.paces_s, list(usual)
    for s in reversed(range(len(usual) - 1)):
        wanted[s] = wanted[s + 1] + usual[s] - usual[s + 1]
        slack = goal - busy[s]
        f, b = paces[s]
        if split:
            if (idle := below[s] - slack) > 0 and f > 0:
                wanted[s] = max(wanted[s], min(microbatches, math.ceil(idle / f - 1e-9)))
        # Idle time falls by F + B for each forward more, then by the smaller of the two.
        elif (both := 2 * below[s] - slack) > 0 and f + b > 0:
            needed = both / (f + b)
            if needed * max(f, b) > below[s] and min(f, b) > 0:
                needed = (below[s] - slack) / min(f, b)
            wanted[s] = max(wanted[s], min(microbatches, math.ceil(needed - 1e-9)))
    return wanted
