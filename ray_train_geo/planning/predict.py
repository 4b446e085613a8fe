"""How long a step of a plan takes, by the event engine: what every plan says of itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from ray_train_geo.cluster.topology import Topology
from ray_train_geo.planning.cost import commit_s, optimizer_s
from ray_train_geo.planning.link_table import LinkTable
from ray_train_geo.planning.memory import stage_parameters
from ray_train_geo.planning.pipeline_cost import message_sizes, stage_times
from ray_train_geo.planning.plan import PipelinePlan, Plan
from ray_train_geo.planning.problem import Problem
from ray_train_geo.planning.sync_cost import sync_groups, synced_s
from ray_train_geo.schedule.actions import Action
from ray_train_geo.schedule.gpipe import gpipe
from ray_train_geo.schedule.one_f_one_b import one_f_one_b
from ray_train_geo.schedule.timeline import Timeline
from ray_train_geo.simulation.engine import simulate
from ray_train_geo.simulation.static_shares import shared_actions, with_static_shares
from ray_train_geo.simulation.work import Flow, PipelineWork
from ray_train_geo.spec import GradientSyncName, JobSpec, ScheduleName

__all__ = ["Prediction", "predict", "predict_plan"]


_MOST_SHARED_ACTIONS = 40_000
"""Sharing NICs fairly takes some 50 to 100 us an action: 64 devices and 1,024 microbatches have
16,000."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """A predicted step, in seconds.

    Args:
        timelines: of each pipeline, first forward to last backward.
        synced_s: ``[pipelines][stages]``; when a stage has its summed gradients.
        step_s: all of it, optimizer and commit round included.
        static_shares: flows had constant shares of NICs and uplinks: the plan is too large to
            share them anew at every message.
    """

    timelines: tuple[Timeline, ...]
    synced_s: tuple[tuple[float, ...], ...]
    step_s: float
    static_shares: bool = False

    @property
    def makespan_s(self) -> tuple[float, ...]:
        """Of each pipeline."""
        return tuple(t.makespan_s for t in self.timelines)

    @property
    def sync_s(self) -> float:
        """Gradient sync after the last pipeline's last backward: what is not hidden."""
        return max(0.0, max(max(s) for s in self.synced_s) - max(self.makespan_s))


def predict_plan(plan: Plan, topology: Topology, job: JobSpec, vocab_size: int = 257) -> Prediction:
    """One step of ``plan`` on ``topology`` (as it is now: links may have changed).

    Raises:
        KeyError: a device of the plan is not in the topology.
        ValueError: two devices that must talk have no link, or the plan's warmup deadlocks.
    """
    problem = Problem.of(topology, job, vocab_size)
    return predict(problem, plan.pipelines, plan.schedule, plan.gradient_sync)


def predict(
    problem: Problem,
    pipelines: Sequence[PipelinePlan],
    schedule: ScheduleName,
    gradient_sync: GradientSyncName,
) -> Prediction:
    """One step of a plan's parts.  Raises as :func:`predict_plan`."""
    table = problem.table
    chains = [[table.index[stage.device] for stage in p.stages] for p in pipelines]
    cuts = [(0, *(stage.layers[1] for stage in p.stages)) for p in pipelines]
    resources = _Resources(table)
    work = []
    schedules = _Schedules(schedule)
    for p, chain, cut in zip(pipelines, chains, cuts, strict=True):
        codecs = [stage.codec for stage in p.stages[:-1]]
        forward, backward = stage_times(problem, chain, cut, codecs)
        hops = list(zip(pairwise(chain), message_sizes(problem, codecs), strict=True))
        work.append(
            PipelineWork(
                schedules.of(tuple(s.warmup for s in p.stages), p.microbatches),
                tuple(forward),
                tuple(backward),
                tuple(resources.flow(a, b, size) for (a, b), size in hops),
                tuple(resources.flow(b, a, size) for (a, b), size in hops),
            )
        )
    rates = resources.seconds_per_byte
    static = shared_actions(work, rates) > _MOST_SHARED_ACTIONS
    timelines = simulate(with_static_shares(work, rates), ()) if static else simulate(work, rates)

    devices = np.array([d for chain in chains for d in chain])
    ends, starts = [], []
    for t, chain in zip(timelines, chains, strict=True):
        ends += [t.end_s(s) for s in range(len(chain))]
        starts += [t.last_start_s(s) for s in range(len(chain))]
    done = synced_s(
        sync_groups(problem.dims, cuts),
        gradient_sync,
        devices,
        np.array(starts),
        np.array(ends),
        table,
    ).tolist()
    stages = [
        (run, problem.topology.devices[d])
        for cut, chain in zip(cuts, chains, strict=True)
        for run, d in zip(pairwise(cut), chain, strict=True)
    ]
    updated = max(
        end + optimizer_s(stage_parameters(problem.dims, run), device)
        for end, (run, device) in zip(done, stages, strict=True)
    )
    offsets = np.cumsum([0, *map(len, chains)]).tolist()
    return Prediction(
        timelines,
        tuple(tuple(done[a:b]) for a, b in pairwise(offsets)),
        updated + commit_s(devices, table),
        static,
    )


class _Schedules:
    """Pipelines alike share one schedule, which also makes comparing them quick."""

    def __init__(self, schedule: ScheduleName) -> None:
        self._schedule = schedule
        self._known: dict[tuple[tuple[int, ...], int], Sequence[Sequence[Action]]] = {}

    def of(self, warmup: tuple[int, ...], microbatches: int) -> Sequence[Sequence[Action]]:
        key = warmup, microbatches
        if key not in self._known:
            gpipe_wanted = self._schedule == "gpipe"
            self._known[key] = (
                gpipe(len(warmup), microbatches) if gpipe_wanted else one_f_one_b(*key)
            )
        return self._known[key]


class _Resources:
    """Numbers for what flows share: each node's NIC, out and in, and each pair of regions."""

    def __init__(self, table: LinkTable) -> None:
        self._table = table
        self._nodes = len(table.nodes)
        self._regions = len(table.regions)
        self.seconds_per_byte = [
            *table.out_seconds_per_byte.tolist(),
            *table.in_seconds_per_byte.tolist(),
            *table.uplink_seconds_per_byte.ravel().tolist(),
        ]

    def flow(self, source: int, target: int, size_bytes: float) -> Flow:
        """The flow of messages from one device to another."""
        table = self._table
        latency, per_byte = table.hop(source, target)
        a, b = int(table.node[source]), int(table.node[target])
        if a == b:
            return Flow(latency, size_bytes, per_byte)
        used = [a, self._nodes + b]
        r, q = int(table.region[source]), int(table.region[target])
        if r != q:
            used.append(2 * self._nodes + r * self._regions + q)
        return Flow(
            latency, size_bytes, per_byte, tuple(u for u in used if self.seconds_per_byte[u] > 0)
        )
