"""Who shares what with whom, once all that can't matter is left out.

A resource can't saturate if all flows that use it, each at the most that its own link lets
through, fit into it; then it limits nobody.  What is left joins pipelines into groups that must be
simulated together::

    pipeline 0 --- NIC --- pipeline 2        groups: {0, 2}, {1}
    pipeline 1 --- uplink that is wide enough --- pipeline 2
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from ray_train_geo.simulation.fair_share import SLACK
from ray_train_geo.simulation.work import Flow, PipelineWork

__all__ = ["groups", "renumbered", "simplified"]


def simplified(
    pipelines: Sequence[PipelineWork], seconds_per_byte: Sequence[float]
) -> list[PipelineWork]:
    """The same work, where flows name only what can saturate.

    A flow is as slow as the slowest thing that it uses, so that a resource of one flow is
    nothing but a slower link.

    Args:
        seconds_per_byte: ``[resources]``; 0 is no limit.
    """

    limited = [_with_flows(p, lambda flow: _limited(flow, seconds_per_byte)) for p in pipelines]
    wanted: dict[int, float] = {}
    for p in limited:
        for flow in (*p.down, *p.up):
            for r in flow.resources:
                wanted[r] = wanted.get(r, 0.0) + 1 / flow.seconds_per_byte
    matters = {r for r, rate in wanted.items() if rate * seconds_per_byte[r] > SLACK}
    return [
        _with_flows(p, lambda f: _over(f, tuple(r for r in f.resources if r in matters)))
        for p in limited
    ]


def groups(pipelines: Sequence[PipelineWork]) -> list[list[int]]:
    """Numbers of the pipelines that shared resources join, directly or through others."""
    leader = list(range(len(pipelines)))

    def find(i: int) -> int:
        while leader[i] != i:
            leader[i] = i = leader[leader[i]]
        return i

    first_user: dict[int, int] = {}
    for i, p in enumerate(pipelines):
        for flow in (*p.down, *p.up):
            for r in flow.resources:
                a, b = sorted((find(first_user.setdefault(r, i)), find(i)))
                leader[b] = a
    members: dict[int, list[int]] = {}
    for i in range(len(pipelines)):
        members.setdefault(find(i), []).append(i)
    return list(members.values())


def renumbered(
    pipelines: Sequence[PipelineWork], seconds_per_byte: Sequence[float]
) -> tuple[list[PipelineWork], list[float]]:
    """The same work with resources numbered by first use, and what is left of them.

    Groups that differ in nothing but which resources they use become equal.
    """
    number: dict[int, int] = {}

    def renamed(flow: Flow) -> Flow:
        return _over(flow, tuple(number.setdefault(r, len(number)) for r in flow.resources))

    work = [_with_flows(p, renamed) for p in pipelines]
    return work, [float(seconds_per_byte[r]) for r in number]


def _limited(flow: Flow, seconds_per_byte: Sequence[float]) -> Flow:
    """At the rate of the slowest thing on its way, and over nothing that is without a limit."""
    resources = tuple(r for r in flow.resources if seconds_per_byte[r] > 0)
    if not resources or not flow.size_bytes:
        return _over(flow, ())
    slowest = max(float(seconds_per_byte[r]) for r in resources)
    return dataclasses.replace(
        flow, seconds_per_byte=max(flow.seconds_per_byte, slowest), resources=resources
    )


def _over(flow: Flow, resources: tuple[int, ...]) -> Flow:
    return flow if resources == flow.resources else dataclasses.replace(flow, resources=resources)


def _with_flows(pipeline: PipelineWork, change: Callable[[Flow], Flow]) -> PipelineWork:
    return dataclasses.replace(
        pipeline,
        down=tuple(change(flow) for flow in pipeline.down),
        up=tuple(change(flow) for flow in pipeline.up),
    )
