"""What a candidate plan costs in closed form: pipelines, what they share, sync, optimizer.

This is what the search looks at; the event engine (`planning.predict`) has the last word.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from ray_train_geo.planning.link_table import Floats, Ints, LinkTable
from ray_train_geo.planning.local_cost import delayed_s, ended_s, step_groups
from ray_train_geo.planning.microbatches import split_microbatches
from ray_train_geo.planning.pipeline_cost import PipelineCost, pipeline_cost
from ray_train_geo.planning.problem import Problem
from ray_train_geo.planning.sync_cost import SyncGroups, synced_s
from ray_train_geo.spec import GradientSyncName

__all__ = ["Candidate", "Chain", "Evaluation", "Evaluator", "objective_value"]


@dataclass(frozen=True, slots=True)
class Chain:
    """A wished pipeline: device numbers in stage order; None leaves the cut or codecs open."""

    devices: tuple[int, ...]
    cut: tuple[int, ...] | None = None
    codecs: tuple[str, ...] | None = None


Candidate = tuple[Chain, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Evaluation:
    """A candidate that fits, and its predicted step.

    Args:
        makespan_s: of each pipeline.
        synced_s: ``[stages]``, counted pipeline by pipeline: when its gradients are summed.
        value: the objective's.
    """

    pipelines: tuple[PipelineCost, ...]
    microbatches: tuple[int, ...]
    gradient_sync: GradientSyncName
    makespan_s: tuple[float, ...]
    synced_s: Floats
    step_s: float
    value: float

    @property
    def rank(self) -> tuple[float, int, int]:
        """Smaller is better.  Nine digits: the order of sums must not decide between equals."""
        stages = [len(p.devices) for p in self.pipelines]
        return float(f"{self.value:.9g}"), sum(stages), max(stages)

    @property
    def candidate(self) -> Candidate:
        """The candidate with its cuts and codecs fixed as they were chosen."""
        return tuple(Chain(p.devices, p.cut, p.codecs) for p in self.pipelines)


def objective_value(problem: Problem, step_s: float, devices: Sequence[int]) -> float:
    """Seconds of a step, or dollars per million tokens."""
    if problem.options.objective != "dollars":
        return step_s
    per_hour = sum(problem.topology.devices[d].price_per_hour for d in devices)
    training = problem.job.training
    tokens = training.global_batch * training.seq_len
    return per_hour / 3600 * step_s / (tokens / 1e6)


class Evaluator:
    """Evaluates candidates of one problem, and remembers the pipelines it has seen."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self._pipelines: dict[tuple[Chain, bool, int], PipelineCost | None] = {}
        self._alike: dict[tuple[object, ...], PipelineCost | None] = {}
        self._groups: dict[tuple[object, ...], list[SyncGroups]] = {}

    def pipeline(self, chain: Chain, pipelines: int, microbatches: int) -> PipelineCost | None:
        """As :func:`pipeline_cost`, remembered."""
        # Only GPipe's memory and short schedules depend on the number of microbatches.
        few = microbatches if self.problem.gpipe else min(microbatches, 8 * len(chain.devices))
        key = chain, pipelines > 1, few
        if key not in self._pipelines:
            self._pipelines[key] = self._from_alike(chain, pipelines, few)
        return self._pipelines[key]

    def _from_alike(self, chain: Chain, pipelines: int, microbatches: int) -> PipelineCost | None:
        """Pipelines of equal devices over equal links cost the same: one of them is computed."""
        problem, devices = self.problem, chain.devices
        kinds = tuple(problem.kinds[d] for d in devices)
        hops = tuple((problem.hop(a, b), problem.hop(b, a)) for a, b in pairwise(devices))
        shares: tuple[float, ...] = ()
        if len(problem.codecs) > 1:
            shares = tuple(
                problem.busiest_seconds_per_byte(a, b, pipelines) for a, b in pairwise(devices)
            )
        key = kinds, hops, shares, chain.cut, chain.codecs, pipelines > 1, microbatches
        if key not in self._alike:
            self._alike[key] = pipeline_cost(
                problem, devices, pipelines, microbatches, chain.cut, chain.codecs
            )
        found = self._alike[key]
        if found is None or found.devices == devices:
            return found
        return replace(found, devices=devices)

    def __call__(
        self,
        candidate: Candidate,
        modes: Sequence[GradientSyncName] | None = None,
        microbatches: Sequence[int] | None = None,
    ) -> Evaluation | None:
        """The candidate's cost with the best of ``modes`` (default: all that the job allows).

        Returns:
            None if it does not fit: memory, microbatches, ``max_devices`` or the budget.
        """
        problem = self.problem
        job, options = problem.job, problem.options
        total = job.training.total_microbatches
        devices = [d for chain in candidate for d in chain.devices]
        count = len(candidate)
        if count > total or len(devices) > (job.scaling.max_devices or len(devices)):
            return None
        if options.max_dollars_per_hour is not None:
            price = sum(problem.topology.devices[d].price_per_hour for d in devices)
            if price > options.max_dollars_per_hour:
                return None
        fixed = microbatches or job.parallelism.microbatches
        pipelines: list[PipelineCost] = []
        for i, chain in enumerate(candidate):
            about = fixed[i] if fixed else -(-total // count)
            found = self.pipeline(chain, count, about)
            if found is None:
                return None
            pipelines.append(found)
        split = tuple(fixed) if fixed else self._split(pipelines, total)
        if split is None or any(m > p.most for m, p in zip(split, pipelines, strict=True)):
            return None

        makespans = self._makespans(pipelines, split)
        cuts = tuple(p.cut for p in pipelines)
        chains = tuple(p.devices for p in pipelines)
        groups = self._step_groups(chains, cuts)
        members = np.array(devices)
        end = np.concatenate(
            [m - np.array(p.tail_s) for m, p in zip(makespans, pipelines, strict=True)]
        )
        last_start = end - np.concatenate([p.times.last_s for p in pipelines])
        update = np.concatenate([p.update_s for p in pipelines])

        bucket = job.parallelism.bucket_bytes
        best: tuple[float, Floats, GradientSyncName] | None = None
        for mode in modes or problem.modes:
            done = synced_s(groups, mode, members, last_start, end, problem.table, bucket)
            if job.parallelism.delay_steps:
                step_s = delayed_s(chains, done, last_start, end, update, problem.table)
            else:
                step_s = ended_s(problem, chains, cuts, done + update)
            if best is None or step_s < best[0] * (1 - 1e-9):
                best = step_s, done, mode
        assert best is not None  # a job allows at least one mode
        return Evaluation(
            pipelines=tuple(pipelines),
            microbatches=split,
            gradient_sync=best[2],
            makespan_s=makespans,
            synced_s=best[1],
            step_s=best[0],
            value=objective_value(problem, best[0], devices),
        )

    def _step_groups(
        self, chains: tuple[tuple[int, ...], ...], cuts: tuple[tuple[int, ...], ...]
    ) -> list[SyncGroups]:
        """As :func:`step_groups`, remembered: only islands of regions depend on the devices."""
        local_sgd = self.problem.job.local_sgd
        where = chains if local_sgd is not None and local_sgd.across == "regions" else ()
        if (cuts, where) not in self._groups:
            self._groups[cuts, where] = step_groups(self.problem, chains, cuts)
        return self._groups[cuts, where]

    def _split(self, pipelines: Sequence[PipelineCost], total: int) -> tuple[int, ...] | None:
        most = [p.most for p in pipelines] if self.problem.gpipe else None
        return split_microbatches(total, [p.lines for p in pipelines], most)

    def _makespans(
        self, pipelines: Sequence[PipelineCost], microbatches: Sequence[int]
    ) -> tuple[float, ...]:
        """Each pipeline's makespan, alone or behind the busiest thing that it shares."""
        alone = [p.makespan_s(m) for p, m in zip(pipelines, microbatches, strict=True)]
        shared = _shared_s(pipelines, microbatches, self.problem.table)
        return tuple(
            max(a, p.round_s + busy * (1 - 1 / m))
            for a, p, busy, m in zip(alone, pipelines, shared, microbatches, strict=True)
        )


def _shared_s(
    pipelines: Sequence[PipelineCost], microbatches: Sequence[int], table: LinkTable
) -> list[float]:
    """For each pipeline: seconds that the busiest NIC or uplink on its way needs for a step."""
    ends: list[tuple[int, int]] = []
    carried: list[float] = []
    owner: list[int] = []
    for i, (p, m) in enumerate(zip(pipelines, microbatches, strict=True)):
        for s, bytes_each in enumerate(p.message_bytes):
            a, b = p.devices[s], p.devices[s + 1]
            ends += [(a, b), (b, a)]
            carried += [m * bytes_each] * 2
            owner += [i, i]
    if not ends:
        return [0.0] * len(pipelines)
    pairs: Ints = np.array(ends)
    size: Floats = np.array(carried)
    who: Ints = np.array(owner)
    node, region = table.node[pairs], table.region[pairs]
    crosses = node[:, 0] != node[:, 1]
    node, region, size, who = node[crosses], region[crosses], size[crosses], who[crosses]
    out = np.bincount(node[:, 0], size, len(table.nodes)) * table.out_seconds_per_byte
    into = np.bincount(node[:, 1], size, len(table.nodes)) * table.in_seconds_per_byte
    busy = np.maximum(out[node[:, 0]], into[node[:, 1]])
    if table.uplink_seconds_per_byte.any():
        between = np.zeros_like(table.uplink_seconds_per_byte)
        np.add.at(between, (region[:, 0], region[:, 1]), size)
        between *= table.uplink_seconds_per_byte
        busy = np.maximum(busy, between[region[:, 0], region[:, 1]])
    worst = np.zeros(len(pipelines))
    np.maximum.at(worst, who, busy)
    found: list[float] = worst.tolist()
    return found
