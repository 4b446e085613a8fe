"""How long a step of a plan takes, by the event engine: what every plan says of itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from ray_train_geo.cluster.topology import Topology
from ray_train_geo.planning.cost import optimizer_s
from ray_train_geo.planning.link_table import Floats
from ray_train_geo.planning.local_cost import delayed_s, ended_s, step_groups
from ray_train_geo.planning.memory import stage_parameters
from ray_train_geo.planning.pipeline_cost import message_sizes, stage_times
from ray_train_geo.planning.plan import PipelinePlan, Plan
from ray_train_geo.planning.problem import Problem
from ray_train_geo.planning.shared_flows import SharedFlows
from ray_train_geo.planning.sync_cost import synced_s
from ray_train_geo.schedule.actions import Action
from ray_train_geo.schedule.make import make_schedule
from ray_train_geo.schedule.timeline import Timeline
from ray_train_geo.simulation.engine import simulate
from ray_train_geo.simulation.work import PipelineWork
from ray_train_geo.spec import GradientSyncName, JobSpec, ScheduleName

__all__ = [
    "Prediction",
    "after_backwards",
    "predict",
    "predict_plan",
    "resynced",
    "shard_weights",
]


@dataclass(frozen=True, slots=True)
class Prediction:
    """A predicted step, in seconds.

    Args:
        timelines: of each pipeline, first forward to last action.
        synced_s: ``[pipelines][stages]``; when a stage has its summed gradients.
        step_s: all of it, optimizer and commit round included.
    """

    timelines: tuple[Timeline, ...]
    synced_s: tuple[tuple[float, ...], ...]
    step_s: float

    @property
    def makespan_s(self) -> tuple[float, ...]:
        """Of each pipeline."""
        return tuple(t.makespan_s for t in self.timelines)

    @property
    def sync_s(self) -> float:
        """Gradient sync after the last pipeline's last backward: what is not hidden."""
        return max(0.0, max(max(s) for s in self.synced_s) - max(self.makespan_s))


def predict_plan(
    plan: Plan,
    topology: Topology,
    job: JobSpec,
    vocab_size: int = 257,
    pace: Sequence[tuple[tuple[float, ...], ...]] | None = None,
) -> Prediction:
    """One step of ``plan`` on ``topology`` (as it is now: links may have changed).

    Args:
        pace: ``[pipelines][stages][any]``; how many times as long as its stage's usual one each
            action takes.

    Raises:
        KeyError: a device of the plan is not in the topology.
        ValueError: two devices that must talk have no link, the plan's warmup deadlocks, or
            ``pace`` is not one of every action.
    """
    problem = Problem.of(topology, job, vocab_size)
    return predict(problem, plan.pipelines, plan.schedule, plan.gradient_sync, pace)


def predict(
    problem: Problem,
    pipelines: Sequence[PipelinePlan],
    schedule: ScheduleName,
    gradient_sync: GradientSyncName,
    pace: Sequence[tuple[tuple[float, ...], ...]] | None = None,
) -> Prediction:
    """One step of a plan's parts.  Raises as :func:`predict_plan`."""
    table = problem.table
    chains = [[table.index[stage.device] for stage in p.stages] for p in pipelines]
    cuts = [(0, *(stage.layers[1] for stage in p.stages)) for p in pipelines]
    resources = SharedFlows(table)
    work = []
    schedules = _Schedules(schedule)
    paces = [None] * len(pipelines) if pace is None else pace
    for p, chain, cut, of_p in zip(pipelines, chains, cuts, paces, strict=True):
        codecs = [stage.codec for stage in p.stages[:-1]]
        forward, backward, weights = stage_times(problem, chain, cut, codecs, schedule)
        hops = list(zip(pairwise(chain), message_sizes(problem, codecs), strict=True))
        work.append(
            PipelineWork(
                schedules.of(p),
                tuple(forward),
                tuple(backward),
                tuple(resources.flow(a, b, size) for (a, b), size in hops),
                tuple(resources.flow(b, a, size) for (a, b), size in hops),
                weight_s=None if weights is None else tuple(weights),
                pace=of_p,
            )
        )
    timelines = simulate(work, resources.seconds_per_byte)
    return _synced(problem, pipelines, gradient_sync, timelines)


def resynced(
    problem: Problem,
    pipelines: Sequence[PipelinePlan],
    gradient_sync: GradientSyncName,
    prediction: Prediction,
) -> Prediction:
    """``prediction`` with gradients summed in another way, or with other shards.

    Args:
        pipelines: those of ``prediction``, but for shards.
    """
    return _synced(problem, pipelines, gradient_sync, prediction.timelines)


def _synced(
    problem: Problem,
    pipelines: Sequence[PipelinePlan],
    gradient_sync: GradientSyncName,
    timelines: tuple[Timeline, ...],
) -> Prediction:
    ends = [
        [t.end_s(s) for s in range(len(p.stages))]
        for t, p in zip(timelines, pipelines, strict=True)
    ]
    starts = [
        [t.last_start_s(s) for s in range(len(p.stages))]
        for t, p in zip(timelines, pipelines, strict=True)
    ]
    done, step_s = after_backwards(problem, pipelines, starts, ends, gradient_sync)
    return Prediction(timelines, done, step_s)


def after_backwards(
    problem: Problem,
    pipelines: Sequence[PipelinePlan],
    last_start_s: Sequence[Sequence[float]],
    end_s: Sequence[Sequence[float]],
    gradient_sync: GradientSyncName,
) -> tuple[tuple[tuple[float, ...], ...], float]:
    """When each stage has its summed gradients, and when the step is committed, in seconds.

    Neither falls when a time that is given grows.  With delayed sums a stage has them as much later
    than its last backward as the step is longer for them.

    Args:
        last_start_s, end_s: ``[pipelines][stages]``; begin and end of a stage's last backward.
    """
    index = problem.table.index
    chains = [[index[stage.device] for stage in p.stages] for p in pipelines]
    cuts = [(0, *(stage.layers[1] for stage in p.stages)) for p in pipelines]
    devices = np.array([d for chain in chains for d in chain])
    starts, ends = (
        np.concatenate([np.array(times) for times in given]) for given in (last_start_s, end_s)
    )
    done = synced_s(
        step_groups(problem, chains, cuts),
        gradient_sync,
        devices,
        starts,
        ends,
        problem.table,
        problem.job.parallelism.bucket_bytes,
        shard_weights(pipelines),
    )
    stages = [
        (run, problem.topology.devices[d])
        for cut, chain in zip(cuts, chains, strict=True)
        for run, d in zip(pairwise(cut), chain, strict=True)
    ]
    update = np.array(
        [optimizer_s(stage_parameters(problem.dims, run), device) for run, device in stages]
    )
    if problem.job.parallelism.delay_steps:
        step_s = delayed_s(chains, done, starts, ends, update, problem.table)
        done = ends + (step_s - float((ends + update).max()))
    else:
        step_s = ended_s(problem, chains, cuts, done + update)
    offsets = np.cumsum([0, *map(len, chains)]).tolist()
    return tuple(tuple(done[a:b].tolist()) for a, b in pairwise(offsets)), step_s


def shard_weights(pipelines: Sequence[PipelinePlan]) -> Floats | None:
    """``[stages]``; of their shards in a sharded PS; None if all are alike."""
    weights = np.array([stage.shard for p in pipelines for stage in p.stages])
    return weights if (weights != weights[0]).any() else None


class _Schedules:
    """Pipelines alike share one schedule, which also makes comparing them quick."""

    def __init__(self, schedule: ScheduleName) -> None:
        self._schedule = schedule
        self._known: dict[tuple[tuple[tuple[int, int], ...], int], Sequence[Sequence[Action]]] = {}

    def of(self, pipeline: PipelinePlan) -> Sequence[Sequence[Action]]:
        key = tuple((s.warmup, s.deferred) for s in pipeline.stages), pipeline.microbatches
        if key not in self._known:
            self._known[key] = make_schedule(
                self._schedule,
                [s.warmup for s in pipeline.stages],
                [s.deferred for s in pipeline.stages],
                pipeline.microbatches,
            )
        return self._known[key]
