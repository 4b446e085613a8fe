"""Constant shares of what flows share: for plans too large to share anew at every message.

Every flow gets the part of a NIC or uplink that its bytes of the step are of all bytes over it, as
if all flows were busy all the time.  So a resource carries what it can and no more; who sends while
others are silent gets nothing of their share, and who has more to send gets more.  Steps come out
about as long as by fair sharing, without its hundreds of thousands of events.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from ray_train_geo.simulation.sharing import groups, simplified
from ray_train_geo.simulation.work import Flow, PipelineWork

__all__ = ["shared_actions", "with_static_shares"]


def shared_actions(pipelines: Sequence[PipelineWork], seconds_per_byte: Sequence[float]) -> int:
    """Actions of all pipelines that share something that can saturate.

    Args:
        seconds_per_byte: ``[resources]``; 0 is no limit.
    """
    work = simplified(pipelines, seconds_per_byte)
    return sum(
        len(todo)
        for members in groups(work)
        for i in members
        if any(flow.resources for flow in (*work[i].down, *work[i].up))
        for todo in work[i].actions
    )


def with_static_shares(
    pipelines: Sequence[PipelineWork], seconds_per_byte: Sequence[float]
) -> list[PipelineWork]:
    """The same work, where no flow shares anything and each has its constant rate."""
    work = simplified(pipelines, seconds_per_byte)
    messages = [sum(a.kind == "F" for a in p.actions[0]) for p in work]
    carried: dict[int, float] = {}
    for p, count in zip(work, messages, strict=True):
        for flow in (*p.down, *p.up):
            for r in flow.resources:
                carried[r] = carried.get(r, 0.0) + count * flow.size_bytes

    def alone(flow: Flow, count: float) -> Flow:
        parts = (
            carried[r] * float(seconds_per_byte[r]) / (count * flow.size_bytes)
            for r in flow.resources
        )
        slowest = max((flow.seconds_per_byte, *parts))
        return dataclasses.replace(flow, seconds_per_byte=slowest, resources=())

    return [
        dataclasses.replace(
            p,
            down=tuple(alone(flow, count) for flow in p.down),
            up=tuple(alone(flow, count) for flow in p.up),
        )
        for p, count in zip(work, messages, strict=True)
    ]
