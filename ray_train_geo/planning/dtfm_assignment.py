"""The placement that DT-FM's cost likes best, with a bound that says how sure that is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from ray_train_geo.cluster.topology import Topology
from ray_train_geo.errors import PlanError
from ray_train_geo.planning.device_classes import DeviceClasses, device_classes
from ray_train_geo.planning.dtfm import DtfmCost, DtfmWorkload, PairCosts, group_cost
from ray_train_geo.planning.dtfm_classes import ClassProblem, Group
from ray_train_geo.planning.dtfm_exact import Minimum, minimum, sketch
from ray_train_geo.planning.dtfm_matching import bottleneck_matching
from ray_train_geo.planning.dtfm_search import search

__all__ = ["DtfmAssignment", "dtfm_assignment"]

Ints = NDArray[np.int64]

_MOVES_TIMES_DEVICES, _MOVES_TIMES_MATCHINGS = 2_500_000, 200_000_000
_PROOF_EFFORT = 60.0
_MOST_PAIRS = 10_000
"""Pairs of classes over all hops: a larger model takes minutes to build and proves nothing."""


@dataclass(frozen=True, slots=True)
class DtfmAssignment:
    """Groups of device ids, and what is known of their cost.

    Args:
        groups: ``[stages][replicas]``, in pipeline order.
        pipelines: ``[replicas][stages]``: the same devices, chained by the bottleneck matchings.
        lower_bound: no placement costs less, in seconds.
        argument: one sentence on what the bound rests on.
    """

    groups: tuple[tuple[str, ...], ...]
    pipelines: tuple[tuple[str, ...], ...]
    cost: DtfmCost
    lower_bound: float
    argument: str


def dtfm_assignment(
    topology: Topology,
    stages: int,
    replicas: int,
    *,
    workload: DtfmWorkload | None = None,
    seed: int = 0,
    moves: int | None = None,
    prove: bool = True,
    proof_effort: float = _PROOF_EFFORT,
    deadline: Callable[[], bool] | None = None,
) -> DtfmAssignment:
    """Choose ``stages`` groups of ``replicas`` devices, and their order, by DT-FM's cost.

    The same arguments give the same result on any machine, unless ``deadline`` cuts it short.

    Args:
        moves: of the local search; by default fewer the more devices there are, for a few seconds.
        prove: search on for a proof, which may find a better placement too.
        proof_effort: the most of CP-SAT's deterministic seconds (one to eight real ones each).
        deadline: asked between moves and pieces of the proof; true: return the best so far.

    Raises:
        PlanError: fewer devices than ``stages * replicas``, or one of these is below 1.
    """
    if stages < 1 or replicas < 1:
        raise PlanError(f"{stages} stages of {replicas} replicas: give at least 1 of each")
    if stages * replicas > len(topology.devices):
        raise PlanError(
            f"{stages} stages of {replicas} replicas need {stages * replicas} devices, but the "
            f"topology has {len(topology.devices)}; use fewer stages or replicas"
        )
    costs = PairCosts.of(topology, replicas, workload or DtfmWorkload())
    if not np.isfinite(costs.table.latency_s).all():
        raise PlanError(
            "some devices have no link between them, so DT-FM's cost is infinite; give every pair "
            "of regions a link, or a default link"
        )
    classes = device_classes(costs.table)
    problem = ClassProblem.of(costs, classes, stages, replicas)
    if moves is None:
        moves = min(
            _MOVES_TIMES_DEVICES // (stages * replicas),
            _MOVES_TIMES_MATCHINGS // (stages * replicas**2),
        )
    regions = _regions(costs, classes)
    relaxed = problem.merged(regions)
    coarse = search(relaxed, seed, moves // 2, deadline=deadline)
    start = _expanded(coarse, regions, problem.sizes)
    chosen = search(problem, seed, moves - moves // 2, [start], deadline)
    sketched = sketch(problem, problem.cost_s(chosen), deadline) if _fits(problem) else None
    if sketched is not None:
        chosen = search(problem, seed, moves // 2, [sketched], deadline)
    bound_s, argument = _simple_bound(problem)
    if prove and _fits(problem):
        found = minimum(problem, problem.cost_s(chosen), proof_effort, deadline)
        chosen = found.groups or chosen
        bound_s, argument = found.lower_bound_s, _argument(found, len(problem.sizes))
    if prove and bound_s < problem.cost_s(chosen) and _fits(relaxed):
        found = minimum(relaxed, problem.cost_s(chosen), proof_effort / 4, deadline)
        if found.lower_bound_s > bound_s:
            bound_s, argument = found.lower_bound_s, _relaxed_argument(found, len(relaxed.sizes))
    numbers = _devices_of(chosen, classes)
    cost = group_cost(costs, numbers)
    ordered = [numbers[k] for k in cost.order]
    names = np.array([device.id for device in costs.table.devices], dtype=object)
    return DtfmAssignment(
        groups=tuple(tuple(names[group]) for group in ordered),
        pipelines=tuple(tuple(names[chain]) for chain in _chained(costs, ordered)),
        cost=DtfmCost(
            cost.total_s, cost.data_parallel_s, cost.pipeline_s, tuple(range(len(ordered)))
        ),
        lower_bound=_rounded(bound_s, cost.total_s),
        argument=argument,
    )


def _simple_bound(problem: ClassProblem) -> tuple[float, str]:
    bound_s = problem.least_data_parallel_s() + (problem.stages - 1) * problem.least_hop_s()
    return bound_s, (
        "The bound is weak: it gives a device the closest partners that any device has, and every "
        "hop the fastest link."
    )


def _fits(problem: ClassProblem) -> bool:
    return problem.stages * len(problem.sizes) ** 2 <= _MOST_PAIRS


def _argument(found: Minimum, classes: int) -> str:
    if found.proven:
        return f"CP-SAT proved that no placement over {classes} classes of equal devices is better."
    return (
        f"The bound may be weak: CP-SAT over {classes} classes of equal devices stopped after "
        f"{found.effort:.1f} deterministic seconds, before it could close the gap."
    )


def _relaxed_argument(found: Minimum, regions: int) -> str:
    kind = "solved to the end" if found.proven else "cut short"
    return (
        f"The bound is of a relaxation, {kind} by CP-SAT, that counts devices by {regions} regions "
        "and takes the best link between two regions for all of theirs."
    )


def _regions(costs: PairCosts, classes: DeviceClasses) -> list[int]:
    """Each class's region, numbered from 0 without holes."""
    regions = [int(costs.table.region[devices[0]]) for devices in classes.members]
    numbers = {region: i for i, region in enumerate(dict.fromkeys(regions))}
    return [numbers[region] for region in regions]


def _expanded(
    groups: Sequence[Group], label: Sequence[int], sizes: Sequence[int]
) -> tuple[Group, ...]:
    """Groups of the relaxation's classes, as groups of the classes that were merged into them."""
    members: dict[int, list[int]] = {}
    for c, (name, size) in enumerate(zip(label, sizes, strict=True)):
        members.setdefault(name, []).extend([c] * size)
    left = {name: iter(classes) for name, classes in members.items()}
    return tuple(tuple(sorted(next(left[c]) for c in group)) for group in groups)


def _devices_of(groups: Sequence[Group], classes: DeviceClasses) -> list[Ints]:
    """Hand out each class's devices in their order."""
    left = [iter(devices) for devices in classes.members]
    return [np.array([next(left[c]) for c in group]) for group in groups]


def _chained(costs: PairCosts, groups: Sequence[Ints]) -> NDArray[np.int64]:
    """``[replicas, stages]``: each device, its partner in the next group, and so on."""
    chains = [groups[0]]
    for _, group in pairwise(groups):
        last = chains[-1]
        _, partner = bottleneck_matching(costs.hop_s(last[:, None], group[None, :]))
        chains.append(group[list(partner)])
    return np.stack(chains, axis=1)


def _rounded(bound_s: float, cost_s: float) -> float:
    """A bound on the cost by classes, whose sums may round otherwise than the cost itself."""
    return cost_s if abs(bound_s - cost_s) <= 1e-9 * cost_s else min(bound_s, cost_s)
