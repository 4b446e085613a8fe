"""How long a step takes: compute, hops, gradient sync, optimizer.

A step is, for every stage: its pipeline's timeline up to its last backward; the gradient sync
with all holders of its layers, which hides behind the last backward as far as that lasts; the
optimizer; and one round of scalars (loss, gradient norm, "all finite") over all workers.
Links are taken as if each flow had one of its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, permutations

from ray_train_geo.cluster.topology import Device, Link, Topology
from ray_train_geo.model.catalog import (
    ModelDims,
    boundary_bytes,
    embedding_parameters,
    head_flops,
    head_parameters,
    layer_flops,
    layer_parameters,
    step_flops,
)
from ray_train_geo.planning.memory import is_cpu, stage_parameters
from ray_train_geo.planning.plan import PipelinePlan, Plan
from ray_train_geo.schedule.gpipe import gpipe
from ray_train_geo.schedule.one_f_one_b import one_f_one_b
from ray_train_geo.schedule.timeline import Hop, Timeline, timeline
from ray_train_geo.spec import GradientSyncName, ScheduleName, TrainingSpec

__all__ = [
    "PipelineTimes",
    "StepPrediction",
    "SyncGroup",
    "backward_s",
    "forward_s",
    "lower_bound_s",
    "optimizer_s",
    "pipeline_timeline",
    "pipeline_times",
    "predict_step",
    "predict_step_s",
    "sync_groups",
    "sync_s",
]

_CPU_MEMORY_BYTES_PER_S = 1e10
_GPU_MEMORY_BYTES_PER_S = 1e12
_OPTIMIZER_BYTES_PER_PARAMETER = 28  # fp32: read weight, gradient, 2 moments; write all but grad
_GRADIENT_BYTES = 4  # gradients are summed in fp32 at every precision

Member = tuple[int, int]
"""(pipeline, stage)"""


@dataclass(frozen=True, slots=True)
class SyncGroup:
    """Stages that hold the same parameters and must sum those parameters' gradients."""

    members: tuple[Member, ...]
    parameters: int


@dataclass(frozen=True, slots=True)
class PipelineTimes:
    """What one microbatch takes on each stage, and on the hops between them (as `timeline`)."""

    forward_s: tuple[float, ...]
    backward_s: tuple[float, ...]
    forward_hop: tuple[Hop, ...]
    backward_hop: tuple[Hop, ...]

    @property
    def period_s(self) -> float:
        """F + B of the slowest stage: the time between microbatches when all goes well."""
        return max(f + b for f, b in zip(self.forward_s, self.backward_s, strict=True))

    def bounds_s(self, microbatches: int) -> list[float]:
        """The earliest that each stage can begin its last backward, whatever the schedule.

        The first forward must come down to the stage, and the stage does one thing at a time.
        """
        reached_s = 0.0
        bounds = []
        for s, (f, b) in enumerate(zip(self.forward_s, self.backward_s, strict=True)):
            bounds.append(reached_s + microbatches * (f + b) - b)
            if s < len(self.forward_hop):
                reached_s += f + self.forward_hop[s].transfer_s + self.forward_hop[s].latency_s
        return bounds

    def hop_s(self) -> tuple[float, ...]:
        """One-way time of a message over each hop, the mean of both directions."""
        return tuple(
            (a.latency_s + a.transfer_s + b.latency_s + b.transfer_s) / 2
            for a, b in zip(self.forward_hop, self.backward_hop, strict=True)
        )


@dataclass(frozen=True, slots=True)
class StepPrediction:
    """A predicted step, in seconds.

    Args:
        makespan_s: of each pipeline, first forward to last backward.
        sync_s: gradient sync after the slowest pipeline's last backward (what is not hidden).
        step_s: all of it, optimizer and commit round included.
    """

    makespan_s: tuple[float, ...]
    sync_s: float
    step_s: float


def _memory_bytes_per_s(device: Device) -> float:
    return _CPU_MEMORY_BYTES_PER_S if is_cpu(device) else _GPU_MEMORY_BYTES_PER_S


def _embedding_s(dims: ModelDims, training: TrainingSpec, device: Device) -> float:
    """Looking tokens up (or adding to their gradients): read and write one hidden state."""
    size = boundary_bytes(dims, training.seq_len, training.microbatch, training.precision)
    return 2 * size / _memory_bytes_per_s(device)


def forward_s(
    dims: ModelDims, training: TrainingSpec, layers: tuple[int, int], device: Device
) -> float:
    """Forward of one microbatch on the stage of ``layers`` (first, last exclusive), in seconds."""
    seq_len, microbatch = training.seq_len, training.microbatch
    flops = (layers[1] - layers[0]) * layer_flops(dims, seq_len, microbatch)
    if layers[1] == dims.layers:
        flops += head_flops(dims, seq_len, microbatch)
    embedding = _embedding_s(dims, training, device) if layers[0] == 0 else 0.0
    return flops / device.flops_per_s + embedding


def backward_s(
    dims: ModelDims, training: TrainingSpec, layers: tuple[int, int], device: Device
) -> float:
    """Backward of one microbatch, in seconds: two forwards, and one more of recomputed layers."""
    again = 0.0
    if training.recompute:
        count = layers[1] - layers[0]
        again = count * layer_flops(dims, training.seq_len, training.microbatch)
    return 2 * forward_s(dims, training, layers, device) + again / device.flops_per_s


def optimizer_s(parameters: int, device: Device) -> float:
    """One AdamW update, in seconds: bound by memory, 28 bytes moved per parameter."""
    return _OPTIMIZER_BYTES_PER_PARAMETER * parameters / _memory_bytes_per_s(device)


def _hop(link: Link, size_bytes: float) -> Hop:
    return Hop(link.latency_s, size_bytes / link.bandwidth_bytes_per_s)


def sync_groups(dims: ModelDims, pipelines: Sequence[PipelinePlan]) -> list[SyncGroup]:
    """Who must sum which gradients: one group per run of layers that no pipeline cuts.

    A tied token matrix has a group of its own: the first and last stages of all pipelines.
    Groups of one member are left out.
    """
    tokens = dims.vocab_size * dims.dim if dims.tied_embeddings else 0
    cuts = sorted({end for p in pipelines for stage in p.stages for end in stage.layers})
    groups = []
    for a, b in pairwise(cuts):
        members = tuple(
            (i, s)
            for i, p in enumerate(pipelines)
            for s, stage in enumerate(p.stages)
            if stage.layers[0] <= a < stage.layers[1]
        )
        parameters = (b - a) * layer_parameters(dims)
        if a == 0:
            parameters += embedding_parameters(dims) - tokens
        if b == dims.layers:
            parameters += head_parameters(dims)
        groups.append(SyncGroup(members, parameters))
    if tokens:
        ends = {(i, s) for i, p in enumerate(pipelines) for s in (0, len(p.stages) - 1)}
        groups.append(SyncGroup(tuple(sorted(ends)), tokens))
    return [g for g in groups if len(g.members) > 1]


def sync_s(
    mode: GradientSyncName, size_bytes: float, members: Sequence[Device], topology: Topology
) -> float:
    """Summing ``size_bytes`` over ``members`` so that all have the sum, in seconds.

    With n members, latency and bandwidth of the worst link that is used (Thakur et al., 2005):

    - allreduce, a ring: ``2 (n-1) latency + 2 (n-1)/n size / bandwidth``
    - sharded_ps, all to all and back: ``2 latency + 2 (n-1)/n size / bandwidth``
    - central_ps, all through the root's link: ``2 latency + 2 (n-1) size / bandwidth``
    """
    n = len(members)
    if n < 2:
        return 0.0
    if mode == "allreduce":
        pairs = list(zip(members, [*members[1:], members[0]], strict=True))
    elif mode == "sharded_ps":
        pairs = list(permutations(members, 2))
    else:
        pairs = [pair for d in members[1:] for pair in ((members[0], d), (d, members[0]))]
    links = [topology.link(a, b) for a, b in pairs]
    latency_s = max(link.latency_s for link in links)
    whole_s = size_bytes / min(link.bandwidth_bytes_per_s for link in links)
    if mode == "allreduce":
        return 2 * (n - 1) * latency_s + 2 * (n - 1) / n * whole_s
    if mode == "sharded_ps":
        return 2 * latency_s + 2 * (n - 1) / n * whole_s
    return 2 * latency_s + 2 * (n - 1) * whole_s


def pipeline_times(
    dims: ModelDims,
    training: TrainingSpec,
    layers: Sequence[tuple[int, int]],
    chain: Sequence[Device],
    topology: Topology,
) -> PipelineTimes:
    """Times of the pipeline that holds ``layers[s]`` on ``chain[s]``."""
    size = boundary_bytes(dims, training.seq_len, training.microbatch, training.precision)
    stages = list(zip(layers, chain, strict=True))
    return PipelineTimes(
        tuple(forward_s(dims, training, run, device) for run, device in stages),
        tuple(backward_s(dims, training, run, device) for run, device in stages),
        tuple(_hop(topology.link(a, b), size) for a, b in pairwise(chain)),
        tuple(_hop(topology.link(b, a), size) for a, b in pairwise(chain)),
    )


def pipeline_timeline(
    times: PipelineTimes, schedule: ScheduleName, warmup: Sequence[int], microbatches: int
) -> Timeline:
    """One pipeline's step, simulated."""
    if schedule == "gpipe":
        actions = gpipe(len(warmup), microbatches)
    else:
        actions = one_f_one_b(warmup, microbatches)
    return timeline(
        actions, times.forward_s, times.backward_s, times.forward_hop, times.backward_hop
    )


def predict_step(
    dims: ModelDims,
    training: TrainingSpec,
    pipelines: Sequence[PipelinePlan],
    schedule: ScheduleName,
    gradient_sync: GradientSyncName,
    topology: Topology,
    devices: Mapping[str, Device],
    cutoff_s: float = math.inf,
) -> StepPrediction | None:
    """Predict one step of a plan's parts.

    Args:
        devices: from ids to devices.
        cutoff_s: don't simulate what can't be faster than this.

    Returns:
        None if the step takes longer than ``cutoff_s`` for sure.
    """
    members = [(i, s) for i, p in enumerate(pipelines) for s in range(len(p.stages))]
    where = {(i, s): devices[pipelines[i].stages[s].device] for i, s in members}
    groups = sync_groups(dims, pipelines)

    # A member's groups share its link, so their times add up.
    load_s = dict.fromkeys(members, 0.0)
    for group in groups:
        size = _GRADIENT_BYTES * group.parameters
        seconds = sync_s(gradient_sync, size, [where[m] for m in group.members], topology)
        for m in group.members:
            load_s[m] += seconds

    times = [
        pipeline_times(
            dims,
            training,
            [stage.layers for stage in p.stages],
            [where[i, s] for s in range(len(p.stages))],
            topology,
        )
        for i, p in enumerate(pipelines)
    ]
    for i, p in enumerate(pipelines):
        for s, begin_s in enumerate(times[i].bounds_s(p.microbatches)):
            if begin_s + max(times[i].backward_s[s], load_s[i, s]) > cutoff_s:
                return None

    timelines = []
    seen: dict[tuple[PipelineTimes, tuple[int, ...], int], Timeline] = {}  # equal ones run once
    for i, p in enumerate(pipelines):
        key = times[i], tuple(stage.warmup for stage in p.stages), p.microbatches
        if key not in seen:
            seen[key] = pipeline_timeline(times[i], schedule, key[1], p.microbatches)
        timelines.append(seen[key])

    # A group's sync can start when its slowest member begins its last backward, and is not done
    # before that backward has ended.
    last_start_s = {(i, s): timelines[i].last_start_s(s) for i, s in members}
    end_s = {(i, s): timelines[i].end_s(s) for i, s in members}
    sync_start_s, sync_end_s = dict(last_start_s), dict(end_s)
    for group in groups:
        latest_start_s = max(last_start_s[m] for m in group.members)
        latest_end_s = max(end_s[m] for m in group.members)
        for m in group.members:
            sync_start_s[m] = max(sync_start_s[m], latest_start_s)
            sync_end_s[m] = max(sync_end_s[m], latest_end_s)
    synced_s = {m: max(sync_end_s[m], sync_start_s[m] + load_s[m]) for m in members}

    done_s = max(
        synced_s[i, s]
        + optimizer_s(stage_parameters(dims, pipelines[i].stages[s].layers), where[i, s])
        for i, s in members
    )
    makespan_s = tuple(t.makespan_s for t in timelines)
    return StepPrediction(
        makespan_s=makespan_s,
        sync_s=max(synced_s.values()) - max(makespan_s),
        step_s=done_s + _commit_s([where[m] for m in members], topology),
    )


def predict_step_s(
    dims: ModelDims, training: TrainingSpec, plan: Plan, topology: Topology
) -> float:
    """Seconds of one step of ``plan`` on ``topology`` (as it is now: links may have changed).

    Raises:
        KeyError: a device of the plan is not in the topology.
    """
    prediction = predict_step(
        dims,
        training,
        plan.pipelines,
        plan.schedule,
        plan.gradient_sync,
        topology,
        {device.id: device for device in topology.devices},
    )
    assert prediction is not None  # only a cutoff gives None
    return prediction.step_s


def _commit_s(workers: Sequence[Device], topology: Topology) -> float:
    """A few bytes from all workers to rank 0 and back: the longest round trip."""
    root = workers[0]
    return max(
        (topology.link(d, root).latency_s + topology.link(root, d).latency_s for d in workers[1:]),
        default=0.0,
    )


def lower_bound_s(dims: ModelDims, training: TrainingSpec, devices: Sequence[Device]) -> float:
    """No plan on ``devices`` is faster: all of a step's FLOPs at all of their FLOP/s.

    In seconds; there must be at least one device.
    """
    flops = step_flops(dims, training.seq_len, training.global_batch, training.recompute)
    return flops / sum(d.flops_per_s for d in devices)
