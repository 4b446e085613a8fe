"""How flows share NICs and uplinks: in rounds, so that a faster network never makes a step slower.

All flows over a resource take turns.  A *round* is one message of a flow and, of every other flow,
its part of the bytes of the step that goes with it; the resource needs ``every_s`` for one::

    a b c . . . a b c . . . a b c          a: one of three equal flows
    |---| every_s
    |---------| compute_s, of the slowest stage: rounds are no closer

    left[k] = max(ready[k] + transfer_s, left[k - 1] + every_s)
    transfer_s = joint_s + (every_s - joint_s) / 2 * min(1, every_s / compute_s)

So a flow's next message leaves no sooner than a round after its last.  A message needs ``joint_s``
with those that are sent at the same time, the same hop of pipelines that compute alike; if there
are none, what it needs alone.  It waits besides for half of the others on average, if the round
is under way when it comes: always, or as often as the resource is busy.  And the last message is
not through before the resource has carried all that goes over it since the first.

In the long run a resource carries what it can and no more, shared by the bytes that flows have to
send.  Nothing depends on when others send: all is a maximum of sums (a max-plus system: Baccelli
et al., *Synchronization and Linearity*), whose terms fall with bandwidth and grow with latency.
So does a step.  Under max-min fair sharing at every moment it does not: a message that comes
sooner can come in the way of one that is urgent, as in Graham's anomalies (1969).

Under GPipe all activations of a pipeline are through before its first gradient leaves: activations
meet activations, and gradients meet gradients.  Under 1F1B a stage in the middle sends the
activations of its warmup before its first gradient, and the last gradients after its last
activation: these rounds are without the messages of the other way::

    activations   a a a ab ab ab ab           a stage's NIC, out of it; k = 3 forwards of warmup
    gradients           ab ab ab ab b b b
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ray_train_geo.schedule.actions import Action
from ray_train_geo.schedule.timeline import Hop
from ray_train_geo.simulation.work import PipelineWork

__all__ = ["SharedHop", "SharedWire", "shared_hops"]


@dataclass(frozen=True, slots=True)
class SharedHop:
    """A directed hop over something that other flows use too.

    Args:
        transfer_s: from when a message is ready until it has left, if none is before it.
        every_s: from one message to the next, at least.
        messages: in the step.
        cold_s: what the slow start of its connection adds to the first message.
        lone: how many messages meet none of their own pipeline's other way: an activation's flow
            sends them first, a gradient's flow last.
        lone_transfer_s, lone_every_s: as the others, for these.
        behind: of a gradient's flow: numbers of the activations' flows that share a resource with
            it, and what that needs for all of the step.
    """

    latency_s: float
    transfer_s: float
    every_s: float
    messages: int
    cold_s: float
    lone: int = 0
    lone_transfer_s: float = 0.0
    lone_every_s: float = 0.0
    behind: tuple[tuple[int, float], ...] | None = None


class SharedWire:
    """Carries the messages of a :class:`SharedHop`.

    Args:
        behind: wires that it shares a resource with, and what that needs for all of the step: the
            last message is not through before it has carried that since the first of theirs.
    """

    __slots__ = ("_behind", "_done_s", "_first_s", "_free_s", "_hop", "_left", "latency_s")

    def __init__(self, hop: SharedHop, behind: Sequence[tuple[SharedWire, float]] = ()) -> None:
        self.latency_s = hop.latency_s
        self._hop = hop
        self._behind = behind
        self._left = hop.messages
        self._free_s = -math.inf  # when the last message left
        self._first_s: float | None = None

    def send(self, ready_s: float) -> float:
        """Take a message that exists from ``ready_s`` on; returns when it arrives."""
        hop, cold_s = self._hop, 0.0
        if self._first_s is None:
            self._first_s, cold_s = ready_s, hop.cold_s
            rounds_s = (hop.messages - hop.lone) * hop.every_s + hop.lone * hop.lone_every_s
            self._done_s = ready_s + rounds_s
        gradients = hop.behind is not None
        lone = self._left <= hop.lone if gradients else hop.messages - self._left < hop.lone
        transfer_s = hop.lone_transfer_s if lone else hop.transfer_s
        every_s = hop.lone_every_s if lone else hop.every_s
        self._left -= 1
        left_s = max(ready_s + transfer_s, self._free_s + every_s)
        if not self._left:
            left_s = max(left_s, self._done_s)
            for wire, all_s in self._behind:
                if wire._first_s is not None:
                    left_s = max(left_s, wire._first_s + all_s)
        self._free_s = left_s = left_s + cold_s
        return left_s + self.latency_s


@dataclass(frozen=True, slots=True)
class _Load:
    """Bytes of the step over one resource: of activations and gradients of pipelines whose
    activations are all through first, and of all others.

    Args:
        apart: some pipeline sends both over it, one after the other.
    """

    down: float = 0.0
    up: float = 0.0
    mixed: float = 0.0
    apart: bool = False

    def met(self, way: int, in_phases: bool) -> float:
        """What a flow shares the resource with, itself included."""
        if in_phases and self.apart:
            return (self.up if way else self.down) + self.mixed
        return self.down + self.up + self.mixed

    def __add__(self, other: _Load) -> _Load:
        return _Load(
            self.down + other.down,
            self.up + other.up,
            self.mixed + other.mixed,
            self.apart or other.apart,
        )


def shared_hops(
    pipelines: Sequence[PipelineWork], seconds_per_byte: Sequence[float]
) -> list[tuple[tuple[Hop | SharedHop, ...], tuple[Hop | SharedHop, ...]]]:
    """What each flow takes among the others: ``[pipelines]``; hops down, and hops up.

    Args:
        seconds_per_byte: ``[resources]``; what the flows' ``resources`` number; 0 is no limit.
    """
    loads: defaultdict[int, _Load] = defaultdict(_Load)
    together: defaultdict[object, float] = defaultdict(float)  # bytes of a round, in step
    phases = [_in_phases(p) for p in pipelines]
    for p, in_phases in zip(pipelines, phases, strict=True):
        own: defaultdict[int, list[float]] = defaultdict(lambda: [0.0, 0.0])
        for way, flows in enumerate((p.down, p.up)):
            for number, flow in enumerate(flows):
                for r in flow.resources:
                    own[r][way] += p.microbatches * flow.size_bytes
                    together[r, way, number, _pace(p)] += flow.size_bytes
        for r, (down, up) in own.items():
            both = down > 0 and up > 0
            loads[r] += _Load(down, up, 0.0, both) if in_phases else _Load(mixed=down + up)

    def hop(number: int, way: int, p: PipelineWork, in_phases: bool) -> Hop | SharedHop:
        flow = (p.up if way else p.down)[number]
        per_byte = [float(seconds_per_byte[r]) for r in flow.resources]
        alone_s = flow.size_bytes * max(flow.seconds_per_byte, *per_byte, 0.0)
        busy = (
            loads[r].met(way, in_phases) * s for r, s in zip(flow.resources, per_byte, strict=True)
        )
        every_s = max(busy, default=0.0) / p.microbatches if flow.size_bytes else 0.0
        if every_s <= alone_s:
            return Hop(flow.latency_s, alone_s, flow.cold_s)
        # every_s is above 0; who computes for no time finds the resource busy.
        met = every_s / max(every_s, _compute_s(p, way if in_phases else None))
        joint = [
            together[r, way, number, _pace(p)] * s
            for r, s in zip(flow.resources, per_byte, strict=True)
        ]
        joint_s = max(alone_s, *joint)
        transfer_s = joint_s + (every_s - joint_s) / 2 * met
        found = SharedHop(flow.latency_s, transfer_s, every_s, p.microbatches, flow.cold_s)
        return found if in_phases else _with_warmup(found, number, way, p, joint_s)

    def _with_warmup(
        found: SharedHop, number: int, way: int, p: PipelineWork, joint_s: float
    ) -> SharedHop:
        """With what its messages take while the other way's have not begun, or have ended."""
        flow, others = (p.up if way else p.down)[number], p.down if way else p.up
        rounds_s, lone, behind = dict[int, float](), list[int](), list[tuple[int, float]]()
        for r in flow.resources:
            per_byte = float(seconds_per_byte[r])
            rounds_s[r] = loads[r].met(way, False) * per_byte / p.microbatches
            for other in (number - 1, number + 1):
                # The stage between the two flows: messages of both leave it, or come to it.
                if 0 <= other < len(others) and r in others[other].resources:
                    lone.append(_lone(p.actions[max(number, other)], way))
                    behind.append((other, rounds_s[r] * p.microbatches))
                    rounds_s[r] -= together[r, 1 - way, other, _pace(p)] * per_byte
        if not lone:
            return found if not way else replace(found, behind=())
        every_s = max(joint_s, *rounds_s.values())
        met = every_s / max(every_s, _compute_s(p, way))
        return replace(
            found,
            lone=min(lone),
            lone_every_s=every_s,
            lone_transfer_s=joint_s + (every_s - joint_s) / 2 * met,
            behind=tuple(behind) if way else None,
        )

    return [
        (
            tuple(hop(number, 0, p, in_phases) for number in range(len(p.down))),
            tuple(hop(number, 1, p, in_phases) for number in range(len(p.up))),
        )
        for p, in_phases in zip(pipelines, phases, strict=True)
    ]


def _in_phases(pipeline: PipelineWork) -> bool:
    """Whether the last stage runs all its forwards before its first backward."""
    kinds = [a.kind for a in pipeline.actions[-1]]
    return "F" not in kinds[kinds.index("B") :] if "B" in kinds else False


def _lone(actions: Sequence[Action], way: int) -> int:
    """Forwards before the stage's first backward (0), or backwards after its last forward (1)."""
    kinds = [a.kind for a in (reversed(actions) if way else actions) if a.kind != "W"]
    return next((n for n, kind in enumerate(kinds) if kind != ("B" if way else "F")), len(kinds))


def _pace(pipeline: PipelineWork) -> object:
    """Equal for pipelines that compute alike."""
    times = pipeline.forward_s, pipeline.backward_s, pipeline.weight_s
    return times, pipeline.microbatches


def _compute_s(pipeline: PipelineWork, way: int | None) -> float:
    """Of one microbatch, on the slowest stage: forwards (0), backwards (1), or all of it."""
    weight_s = pipeline.weight_s or (0.0,) * len(pipeline.backward_s)
    backward_s = [b + w for b, w in zip(pipeline.backward_s, weight_s, strict=True)]
    if way is None:
        return max(f + b for f, b in zip(pipeline.forward_s, backward_s, strict=True))
    return max(backward_s if way else pipeline.forward_s)
