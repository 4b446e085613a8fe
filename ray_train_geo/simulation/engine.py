"""One step of a whole plan: all pipelines at once, over the NICs and uplinks that they share.

Compute and schedules are :class:`PipelineRun`'s.  Each hop is one flow: its messages go one behind
the other, share what they run over in rounds (:mod:`.rounds`), and arrive ``latency_s`` after their
last byte has left.  Sends overlap compute; directions share nothing unless their flows name the
same resource.
"""

from __future__ import annotations

from collections.abc import Sequence

from ray_train_geo.schedule.actions import Action
from ray_train_geo.schedule.pipeline_run import PipelineRun, Wire
from ray_train_geo.schedule.timeline import Hop, PrivateWire, Timeline
from ray_train_geo.simulation.rounds import SharedHop, SharedWire, shared_hops
from ray_train_geo.simulation.work import PipelineWork

__all__ = ["simulate"]

_Pace = tuple[tuple[float, ...], ...] | None


def simulate(
    pipelines: Sequence[PipelineWork], seconds_per_byte: Sequence[float]
) -> tuple[Timeline, ...]:
    """Simulate one step, from the first forwards to each stage's last action.

    More bandwidth of a flow or a resource, or less latency, makes no action later.  Pipelines that
    differ in nothing are simulated once.  The same input gives the same floats.

    Args:
        pipelines: all those of the plan.
        seconds_per_byte: ``[resources]``; what the flows' ``resources`` number; 0 is no limit.

    Returns:
        ``[pipelines]``.

    Raises:
        ValueError: lengths that do not match, or a schedule that deadlocks; then the message
            names the stages that are stuck and what they wait for.
    """
    timelines: list[Timeline] = []
    done: dict[object, list[tuple[Sequence[Sequence[Action]], _Pace, Timeline]]] = {}
    for work, hops in zip(pipelines, shared_hops(pipelines, seconds_per_byte), strict=True):
        times = work.forward_s, work.backward_s, work.weight_s
        key = times, work.blocking_sends, work.traffic_slowdown, hops
        # Schedules are long and seldom differ: comparing them is cheap, hashing is not.
        alike = done.setdefault(key, [])
        for actions, pace, known in alike:
            if actions == work.actions and pace == work.pace:
                timelines.append(known)
                break
        else:
            timelines.append(_timeline(work, *hops))
            alike.append((work.actions, work.pace, timelines[-1]))
    return tuple(timelines)


def _timeline(
    work: PipelineWork, down: Sequence[Hop | SharedHop], up: Sequence[Hop | SharedHop]
) -> Timeline:
    forward_s, backward_s = work.forward_s, work.backward_s
    if work.traffic_slowdown:
        forward_s = _slowed(forward_s, down, work.traffic_slowdown)
        backward_s = _slowed(backward_s, up, work.traffic_slowdown)
    wires = [_wire(hop) for hop in down]
    run = PipelineRun(
        work.actions,
        forward_s,
        backward_s,
        wires,
        [_wire(hop, wires) for hop in up],
        weight_s=work.weight_s,
        pace=work.pace,
        blocking_sends=work.blocking_sends,
    )
    run.run()
    return Timeline.of(run)


def _wire(hop: Hop | SharedHop, down: Sequence[Wire] = ()) -> Wire:
    if not isinstance(hop, SharedHop):
        return PrivateWire(hop)
    behind = [(down[number], all_s) for number, all_s in hop.behind or ()]
    return SharedWire(hop, [(wire, s) for wire, s in behind if isinstance(wire, SharedWire)])


def _slowed(
    seconds: Sequence[float], hops: Sequence[Hop | SharedHop], slowdown: float
) -> tuple[float, ...]:
    """``[stages]``; of a pass whose messages go over ``hops``, into a stage and out of it."""
    wire_s = [hop.transfer_s for hop in hops]
    return tuple(
        each + slowdown * (before + after)
        for each, before, after in zip(seconds, [0.0, *wire_s], [*wire_s, 0.0], strict=True)
    )
