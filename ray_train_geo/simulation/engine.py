"""One step of a whole plan: all pipelines at once, over the NICs and uplinks that they share.

Compute and schedules are :class:`PipelineRun`'s.  Each hop is one flow: its messages go one behind
the other, share what they run over by max-min fairness with all that is under way at that moment,
and arrive ``latency_s`` after their last byte has left.  Sends overlap compute; directions share
nothing unless their flows name the same resource.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from heapq import heappop, heappush

from ray_train_geo.schedule.actions import Kind
from ray_train_geo.schedule.pipeline_run import PipelineRun, Wire
from ray_train_geo.schedule.timeline import PrivateWire, Timeline, timeline
from ray_train_geo.simulation.network import Network
from ray_train_geo.simulation.sharing import groups, renumbered, simplified
from ray_train_geo.simulation.work import Flow, PipelineWork

__all__ = ["simulate"]

_Agenda = list[tuple[float, int]]
"""A heap: (when, which wire) puts its next message on its way."""


def simulate(
    pipelines: Sequence[PipelineWork], seconds_per_byte: Sequence[float]
) -> tuple[Timeline, ...]:
    """Simulate one step, from the first forwards to each stage's last action.

    Pipelines that share nothing that can saturate are simulated alone, by
    :func:`~ray_train_geo.schedule.timeline.timeline`; equal ones, and equal groups of ones that
    do share, once.  The same input gives the same floats.

    Where things are shared, more capacity can make a step slower: who comes sooner can come in
    the way of who is urgent.  And over hundreds of messages on full NICs, differences in the last
    bit can grow to 1e-4 of a step.

    Args:
        pipelines: all those of the plan.
        seconds_per_byte: ``[resources]``; what the flows' ``resources`` number; 0 is no limit.

    Returns:
        ``[pipelines]``.

    Raises:
        ValueError: lengths that do not match, or a schedule that deadlocks; then the message
            names the stages that are stuck and what they wait for.
    """
    work = simplified(pipelines, seconds_per_byte)
    timelines: list[Timeline | None] = [None] * len(work)
    done: dict[object, list[tuple[list[PipelineWork], tuple[Timeline, ...]]]] = {}
    for members in groups(work):
        group, per_byte = renumbered([work[i] for i in members], seconds_per_byte)
        # Schedules are long and seldom differ: comparing them is cheap, hashing is not.
        times = tuple(
            (p.forward_s, p.backward_s, p.weight_s, p.down, p.up, p.blocking_sends) for p in group
        )
        alike = done.setdefault((times, tuple(per_byte)), [])
        result = next((known for other, known in alike if other == group), None)
        if result is None:
            result = _together(group, per_byte) if per_byte else (_alone(group[0]),)
            alike.append((group, result))
        for i, t in zip(members, result, strict=True):
            timelines[i] = t
    return tuple(t for t in timelines if t is not None)


def _alone(work: PipelineWork) -> Timeline:
    down, up = [flow.hop for flow in work.down], [flow.hop for flow in work.up]
    return timeline(
        work.actions,
        work.forward_s,
        work.backward_s,
        down,
        up,
        weight_s=work.weight_s,
        pace=work.pace,
        blocking_sends=work.blocking_sends,
    )


class _SharedWire:
    """A wire whose messages wait here until their turn comes in the network.

    Args:
        number: of its flow.
        sends: whom to tell when the next message wants to go.
    """

    def __init__(self, number: int, flow: Flow, sends: _Agenda) -> None:
        self.latency_s = flow.latency_s
        self._number = number
        self._cold_s = flow.cold_s  # of the next message
        self._free_s = 0.0  # when the last message had left: a cold one lasts longer than its turn
        self._sends = sends
        self._queue: deque[tuple[float, int]] = deque()  # (ready_s, microbatch), first on the wire

    def connect(self, run: PipelineRun, stages: tuple[int, int], kind: Kind) -> None:
        """Say which stages are at its ends (from, to), and which actions wait at the other."""
        self._run, self._stages, self._kind = run, stages, kind

    def send(self, microbatch: int, ready_s: float) -> None:
        if not self._queue:
            heappush(self._sends, (max(ready_s, self._free_s), self._number))
        self._queue.append((ready_s, microbatch))

    def sent(self, now_s: float) -> None:
        """The first message has left, but for a cold start: deliver it, let the next one go."""
        _, microbatch = self._queue.popleft()
        self._free_s = now_s + self._cold_s
        self._cold_s = 0.0
        if self._queue:
            heappush(self._sends, (max(self._free_s, self._queue[0][0]), self._number))
        sender, receiver = self._stages
        self._run.resume(sender, self._free_s)
        self._run.deliver(receiver, self._kind, microbatch, self._free_s + self.latency_s)


def _together(
    pipelines: Sequence[PipelineWork], seconds_per_byte: Sequence[float]
) -> tuple[Timeline, ...]:
    """Pipelines whose flows name only resources that can saturate."""
    shared: list[Flow] = []
    wires: list[_SharedWire] = []
    sends: _Agenda = []

    def wire(flow: Flow) -> Wire:
        if not flow.resources:
            return PrivateWire(flow.hop)
        wires.append(_SharedWire(len(shared), flow, sends))
        shared.append(flow)
        return wires[-1]

    runs = []
    for p in pipelines:
        down, up = [wire(flow) for flow in p.down], [wire(flow) for flow in p.up]
        run = PipelineRun(
            p.actions,
            p.forward_s,
            p.backward_s,
            down,
            up,
            weight_s=p.weight_s,
            pace=p.pace,
            blocking_sends=p.blocking_sends,
        )
        for s, (below, above) in enumerate(zip(down, up, strict=True)):
            if isinstance(below, _SharedWire):
                below.connect(run, (s, s + 1), "F")
            if isinstance(above, _SharedWire):
                above.connect(run, (s + 1, s), "B")
        runs.append(run)

    network = Network(shared, seconds_per_byte)
    for run in runs:
        run.start()
    while True:
        now_s = min(network.next_s(), sends[0][0] if sends else math.inf)
        if now_s == math.inf:
            return tuple(Timeline.of(run) for run in runs)
        # All of this instant, before rates are shared anew: a message on the heels of another
        # changes none.
        for number in network.finish(now_s):
            wires[number].sent(now_s)
        while sends and sends[0][0] <= now_s:
            network.start(heappop(sends)[1], now_s)
        network.share(now_s)
