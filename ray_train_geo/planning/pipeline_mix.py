"""The best mix of pipelines by class of device: a throughput bound and a warm start.

A pipeline is a chain of devices known by class; its period is the time of its slowest stage.  For
every period that some stage can have, the chain that is cheapest at the dual prices is a column of
a linear program; its optimum bounds the throughput of all plans, hops and sync aside.  CP-SAT then
picks whole pipelines among the columns: a good start, though another column might be better still.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from ortools.sat.python import cp_model

from ray_train_geo.errors import PlanError
from ray_train_geo.planning.certify_chains import Chain, Chains, DeviceClasses
from ray_train_geo.planning.certify_packing import Limits, pack
from ray_train_geo.planning.link_table import Floats, Ints
from ray_train_geo.planning.problem import Problem

__all__ = ["PipelineKind", "PipelineMix", "best_mix"]

_SLACK = 1e-9
_FINEST = 1e-3
"""Periods closer than this (relative) are one, as the shorter for worth, the longer for layers."""
_UNITS = 1_000_000
"""CP-SAT counts throughput in such parts of the fastest pipeline's."""
_DETERMINISTIC_TIME = 2.0


@dataclass(frozen=True, slots=True)
class PipelineKind:
    """Equal pipelines.

    Args:
        devices: class of each stage's device, in stage order; indices of ``PipelineMix.classes``.
        layers: of each stage.
        period_s: F + B of the slowest stage.
        multiplicity: how many there are.
    """

    devices: tuple[int, ...]
    layers: tuple[int, ...]
    period_s: float
    multiplicity: int


@dataclass(frozen=True, slots=True)
class PipelineMix:
    """Whole pipelines, and what no mix can beat; both in microbatches per second.

    Args:
        classes: device numbers (in the problem's link table) of each class.
    """

    throughput_bound: float
    classes: tuple[tuple[int, ...], ...]
    pipelines: tuple[PipelineKind, ...]

    @property
    def throughput(self) -> float:
        """Of the pipelines, as long as nothing but compute counts."""
        return sum(kind.multiplicity / kind.period_s for kind in self.pipelines)


def best_mix(problem: Problem) -> PipelineMix:
    """Pipelines of whole layers with the highest throughput that the devices' memory allows.

    What the job fixes of stages, pipelines and devices is obeyed; links do not count.

    Raises:
        PlanError: no chain of devices has memory for the model.
    """
    job, options = problem.job, problem.options
    classes = DeviceClasses.of(problem, largest_node=0)
    classes = classes.merged([0] * len(classes.count))
    shortest, longest = _periods(problem, classes)
    chains = _within_period(problem, classes, longest)
    limits = Limits(
        job.fixed_pipelines() or job.training.total_microbatches,
        0,
        job.scaling.max_devices,
        options.max_dollars_per_hour,
    )
    packing = pack(1 / shortest, chains, classes, limits)
    if not packing.chains:
        raise PlanError(
            "no chain of these devices has memory for the model: add devices with more memory, "
            "or use a smaller microbatch or recomputation"
        )
    kinds = {chain: _period_s(classes, chain) for chain in packing.chains}
    return PipelineMix(packing.bound, classes.devices, _whole(kinds, classes, limits))


def _periods(problem: Problem, classes: DeviceClasses) -> tuple[Floats, Floats]:
    """Ranges (shortest, longest) of all times that a stage of any class may take, ascending."""
    layers = np.arange(problem.dims.layers + 1)[:, None]
    work = layers * classes.layer_s.sum(axis=1)
    embedding, head = classes.embedding_s.sum(axis=1), classes.head_s.sum(axis=1)
    times = np.unique(
        np.concatenate([work, work + embedding, work + head, work + embedding + head])
    )
    times = times[times > 0]
    fine = np.floor(np.log(times) / np.log1p(_FINEST))
    starts = np.flatnonzero(np.diff(fine, prepend=-np.inf))
    return times[starts], times[np.append(starts[1:], len(times)) - 1]


def _within_period(problem: Problem, classes: DeviceClasses, period_s: Floats) -> Chains:
    first, inner, last, only = classes.most_layers(problem, 1)
    embedding, head = classes.embedding_s.sum(axis=1), classes.head_s.sum(axis=1)
    layer = classes.layer_s.sum(axis=1)

    def most(memory: Ints, extra: Floats | float) -> Ints:
        found = np.floor((period_s[:, None] - extra) / layer * (1 + _SLACK) + _SLACK)
        whole: Ints = np.clip(found, 0, memory[None]).astype(np.int64)
        return whole

    return Chains(
        layers=problem.dims.layers,
        first=most(first, embedding),
        inner=most(inner, 0.0)[:, None],
        last=most(last, head)[:, None],
        only=most(only, embedding + head),
        depth=problem.job.parallelism.stages,
    )


def _period_s(classes: DeviceClasses, chain: Chain) -> float:
    used = list(chain.classes)
    times = np.array(chain.layers) * classes.layer_s[used].sum(axis=1)
    times[0] += classes.embedding_s[used[0]].sum()
    times[-1] += classes.head_s[used[-1]].sum()
    return float(times.max())


def _whole(
    kinds: dict[Chain, float], classes: DeviceClasses, limits: Limits
) -> tuple[PipelineKind, ...]:
    """Whole pipelines of these kinds with the highest throughput, by CP-SAT."""
    fastest = min(kinds.values())
    model = cp_model.CpModel()
    chains = list(kinds)
    total = int(classes.count.sum())
    most = [
        min(int(classes.count[c]) // chain.classes.count(c) for c in set(chain.classes))
        for chain in chains
    ]
    times = [model.new_int_var(0, n, f"kind {i}") for i, n in enumerate(most)]
    for c, count in enumerate(classes.count):
        model.add(
            sum(x * k.classes.count(c) for x, k in zip(times, chains, strict=True)) <= int(count)
        )
    if limits.devices is not None:
        used = sum(x * len(k.classes) for x, k in zip(times, chains, strict=True))
        model.add(used <= min(total, limits.devices))
    if limits.pipelines is not None:
        model.add(sum(times) <= limits.pipelines)
    if limits.dollars_per_hour is not None:
        cents = [round(float(classes.price_per_hour[list(k.classes)].sum()) * 1e4) for k in chains]
        spent = sum(x * c for x, c in zip(times, cents, strict=True))
        model.add(spent <= int(limits.dollars_per_hour * 1e4))
    model.maximize(
        sum(x * int(_UNITS * fastest / kinds[k]) for x, k in zip(times, chains, strict=True))
    )
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 1
    solver.parameters.random_seed = 0
    solver.parameters.max_deterministic_time = _DETERMINISTIC_TIME
    solver.solve(model)  # no pipeline at all is always allowed, so there is an answer
    counts = [solver.value(x) for x in times]
    return tuple(
        PipelineKind(k.classes, k.layers, kinds[k], n)
        for k, n in zip(chains, counts, strict=True)
        if n
    )
