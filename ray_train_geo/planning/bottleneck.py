"""Where the step of a plan goes, and what limits it, named.

::

    |-- compute of the busiest stage --|-- bubble --|-- sync --|-- optimizer --|-- commit --|
    |-------- longest makespan: first F to last B --|
    |-- its limit: a stage, hop, NIC or uplink --|-- fill, drain, latency --|
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, pairwise

import numpy as np

from ray_train_geo.cluster.topology import Device
from ray_train_geo.planning.codecs import wire_bytes
from ray_train_geo.planning.cost import optimizer_s
from ray_train_geo.planning.link_table import Floats, Ints, LinkTable
from ray_train_geo.planning.local_cost import step_groups
from ray_train_geo.planning.memory import stage_parameters
from ray_train_geo.planning.plan import Plan, Role
from ray_train_geo.planning.predict import Prediction, shard_weights
from ray_train_geo.planning.problem import Problem
from ray_train_geo.planning.route_cost import route_loads
from ray_train_geo.planning.sync_cost import SyncGroups, synced_s
from ray_train_geo.planning.sync_routes import ROUTED
from ray_train_geo.schedule.timeline import Timeline
from ray_train_geo.spec import GradientSyncName

__all__ = ["Breakdown", "bottleneck", "breakdown", "compute_s", "unsynced_s"]

_SAME = 0.01
"""Shares of the exposed sync: a smaller difference does not name a cause."""


@dataclass(frozen=True, slots=True)
class Breakdown:
    """Where a step goes; the parts add up to it.

    Args:
        compute_s: of the stage that computes longest.
        bubble_s: the rest of the longest pipeline: fill, drain, waiting for messages.
        sync_s: gradient sync after the last backward: what is not hidden.
        optimizer_s: after that, up to the last stage's update.
        commit_s: scalars on their way to rank 0, and its word to the pipelines.
    """

    compute_s: float
    bubble_s: float
    sync_s: float
    optimizer_s: float
    commit_s: float


@dataclass(frozen=True, slots=True)
class _Limit:
    """What takes part of the step; in words: ``what``, how much of the step, ``more``."""

    seconds: float
    what: str
    more: str = ""


def compute_s(timeline: Timeline, stage: int) -> float:
    """Seconds of all forwards and backwards of ``stage``."""
    return sum(
        end - start
        for start, end in zip(timeline.starts_s[stage], timeline.ends_s[stage], strict=True)
    )


def breakdown(problem: Problem, plan: Plan, prediction: Prediction) -> Breakdown:
    """Divide the step of ``prediction``."""
    makespan = max(prediction.makespan_s)
    busiest = max(compute_s(t, s) for t in prediction.timelines for s in range(len(t.actions)))
    updated = max(
        prediction.synced_s[r.pipeline][r.stage] + _update_s(problem, plan, r) for r in plan.roles()
    )
    compute = min(busiest, makespan)  # but for rounding
    return Breakdown(
        compute_s=compute,
        bubble_s=makespan - compute,
        sync_s=prediction.sync_s,
        optimizer_s=updated - makespan - prediction.sync_s,
        commit_s=prediction.step_s - updated,
    )


def unsynced_s(problem: Problem, plan: Plan, prediction: Prediction) -> float:
    """The step if gradient sync took no time, in seconds."""
    ended = max(
        prediction.timelines[r.pipeline].end_s(r.stage) + _update_s(problem, plan, r)
        for r in plan.roles()
    )
    return ended + breakdown(problem, plan, prediction).commit_s


def bottleneck(problem: Problem, plan: Plan, prediction: Prediction) -> str:
    """One sentence on what takes the largest part of the step."""
    parts, step_s = breakdown(problem, plan, prediction), prediction.step_s
    # Of equal ones the first: stages before hops before NICs, each in the plan's order.
    full = max(
        chain(
            _busy_stages(problem, plan, prediction),
            _full_hops(problem, plan),
            _full_shared(problem, plan),
        ),
        key=lambda limit: float(f"{limit.seconds:.9g}"),
    )
    waiting = _Limit(
        parts.compute_s + parts.bubble_s - full.seconds,
        "the pipelines fill, drain and wait for messages",
        f"; no stage computes more than {parts.compute_s / step_s:.0%} of it",
    )
    sync = _Limit(parts.sync_s, "gradient sync is waited for")
    optimizer = _Limit(parts.optimizer_s, "the optimizer takes")
    commit = _Limit(parts.commit_s, "the commit's way to rank 0 and back takes")
    worst = max((full, waiting, sync, optimizer, commit), key=lambda limit: limit.seconds)
    if worst is sync:
        worst = replace(sync, more=f"; last is {_last_synced(problem, plan, prediction)}")
    return f"{worst.what} {worst.seconds / step_s:.0%} of the step{worst.more}"


def _update_s(problem: Problem, plan: Plan, role: Role) -> float:
    stage = plan.stage(role)
    parameters = stage_parameters(problem.dims, stage.layers)
    return optimizer_s(parameters, problem.devices[stage.device])


def _name(problem: Problem, plan: Plan, role: Role) -> str:
    stage = plan.stage(role)
    first, last = stage.layers[0], stage.layers[1] - 1
    layers = f"layer {first}" if first == last else f"layers {first}-{last}"
    kind = problem.devices[stage.device].type
    return f"pipeline {role.pipeline} stage {role.stage} ({stage.device}, {kind}, {layers})"


def _busy_stages(problem: Problem, plan: Plan, prediction: Prediction) -> Iterator[_Limit]:
    for role in plan.roles():
        seconds = compute_s(prediction.timelines[role.pipeline], role.stage)
        yield _Limit(seconds, f"{_name(problem, plan, role)} computes")


def _flows(problem: Problem, plan: Plan) -> Iterator[tuple[str, int, int, float]]:
    """(stages, from device, to device, bytes in the step) of every hop, both ways."""
    index = problem.table.index
    elements, precision = problem.message_elements, problem.job.training.precision
    for p, pipeline in enumerate(plan.pipelines):
        for s, (a, b) in enumerate(pairwise(pipeline.stages)):
            size = pipeline.microbatches * wire_bytes(a.codec, elements, precision)
            ends = index[a.device], index[b.device]
            yield f"pipeline {p} stage {s} to {s + 1}", *ends, size
            yield f"pipeline {p} stage {s + 1} to {s}", *ends[::-1], size


def _full_hops(problem: Problem, plan: Plan) -> Iterator[_Limit]:
    devices = problem.topology.devices
    for stages, a, b, size in _flows(problem, plan):
        name = f"{stages} ({devices[a].id} -> {devices[b].id})"
        yield _Limit(size * problem.hop(a, b)[1], f"the hop of {name} is full")


def _full_shared(problem: Problem, plan: Plan) -> Iterator[_Limit]:
    """NICs and uplinks: seconds that they need for all that the pipelines send over them."""
    table = problem.table
    nodes, regions = table.node.tolist(), table.region.tolist()
    busy: dict[str, float] = {}
    for _, a, b, size in _flows(problem, plan):
        m, n, r, q = nodes[a], nodes[b], regions[a], regions[b]
        if m == n:
            continue
        used = {
            f"the NIC out of node {table.nodes[m]}": table.out_seconds_per_byte[m],
            f"the NIC into node {table.nodes[n]}": table.in_seconds_per_byte[n],
        }
        if r != q:
            name = f"the uplink {table.regions[r]} -> {table.regions[q]}"
            used[name] = table.uplink_seconds_per_byte[r, q]
        for name, per_byte in used.items():
            busy[name] = busy.get(name, 0.0) + size * float(per_byte)
    for name, seconds in busy.items():
        yield _Limit(seconds, f"{name} is full")


def _last_synced(problem: Problem, plan: Plan, prediction: Prediction) -> str:
    """The stage that has its gradients last, and what carries them so slowly."""
    roles = list(plan.roles())
    last = max(roles, key=lambda r: prediction.synced_s[r.pipeline][r.stage])
    table = problem.table
    devices = np.array([table.index[plan.stage(r).device] for r in roles])
    timelines = [prediction.timelines[r.pipeline] for r in roles]
    starts = np.array([t.last_start_s(r.stage) for t, r in zip(timelines, roles, strict=True)])
    ends = np.array([t.end_s(r.stage) for t, r in zip(timelines, roles, strict=True)])
    groups = step_groups(
        problem,
        [[table.index[stage.device] for stage in p.stages] for p in plan.pipelines],
        [(0, *(stage.layers[1] for stage in p.stages)) for p in plan.pipelines],
    )

    def is_waiting_for(unlimited: LinkTable) -> bool:
        """Whether the stage would be done earlier without the limit that this table lacks."""
        bucket = problem.job.parallelism.bucket_bytes
        weights = shard_weights(plan.pipelines)
        done = synced_s(
            groups, plan.gradient_sync, devices, starts, ends, unlimited, bucket, weights
        )
        late_s = prediction.synced_s[last.pipeline][last.stage] - float(done[last.rank])
        return late_s > _SAME * prediction.sync_s

    free, free_uplinks = np.zeros(len(table.nodes)), np.zeros_like(table.uplink_seconds_per_byte)
    if is_waiting_for(replace(table, out_seconds_per_byte=free, in_seconds_per_byte=free)):
        cause = f"the NIC of node {table.nodes[table.node[devices[last.rank]]]}"
    elif is_waiting_for(replace(table, uplink_seconds_per_byte=free_uplinks)):
        cause = "the uplinks between regions"
    else:
        a, b = _slowest_pair(groups, plan.gradient_sync, last.rank, devices, table)
        cause = f"its group's slowest link, {a.id} -> {b.id} ({a.region} -> {b.region})"
    return f"{_name(problem, plan, last)}, which waits for {cause}"


def _slowest_pair(
    groups: Sequence[SyncGroups],
    mode: GradientSyncName,
    rank: int,
    devices: Ints,
    table: LinkTable,
) -> tuple[Device, Device]:
    """The two devices that take longest for one message of the sync of ``rank``'s groups."""
    slowest = 0.0, 0, 0
    for g in groups:
        for size, row in zip(g.size_bytes.tolist(), g.members, strict=True):
            if rank not in row:
                continue
            members = devices[row]
            source, target = members[:, None], members[None, :]
            share: Floats | float = size / len(members)
            if mode == "allreduce":
                source, target = members, np.roll(members, -1)
            elif mode == "central_ps":
                others = members[1:]
                root = np.full(len(others), members[0])
                source, target = np.r_[others, root], np.r_[root, others]
                share = size
            elif mode in ROUTED:
                share = route_loads(mode, np.array([size]), members[None, :], table).parts[0] * size
            latency, per_byte = table.hops(source, target)
            sources, targets = np.broadcast_arrays(source, target)
            idle = (sources == targets) | (np.asarray(share) == 0)
            seconds = np.where(idle, 0.0, latency + share * per_byte)
            worst = int(seconds.argmax())
            pair = int(sources.flat[worst]), int(targets.flat[worst])
            slowest = max(slowest, (float(seconds.flat[worst]), *pair))
    return table.devices[slowest[1]], table.devices[slowest[2]]
