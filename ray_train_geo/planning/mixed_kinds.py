"""Pipelines of unequal devices, mixed as the configuration program mixes them.

The program (`planning.pipeline_mix`) knows classes and no links; here its pipelines get real
devices, all together or region by region.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ray_train_geo.errors import PlanError
from ray_train_geo.planning.constructions import Shape
from ray_train_geo.planning.evaluate import Candidate, Chain
from ray_train_geo.planning.problem import Problem

__all__ = ["mixed_kinds"]


def mixed_kinds(problem: Problem, usable: Sequence[int]) -> Iterator[Candidate]:
    """Plans of the best mixes; none where all devices are of one kind."""
    if len({problem.kinds[d] for d in usable}) < 2:
        return
    shape = Shape.of(problem)
    everyone = _chains(problem, usable)
    if everyone and len(everyone) == (shape.pipelines or len(everyone)):
        yield everyone
    regions = problem.table.region
    parts = [[d for d in usable if regions[d] == r] for r in range(len(problem.table.regions))]
    if shape.pipelines is None and sum(map(bool, parts)) > 1:
        apart = tuple(chain for part in parts if part for chain in _chains(problem, part))
        if apart:
            yield apart


def _chains(problem: Problem, devices: Sequence[int]) -> Candidate:
    """The best mix of ``devices`` alone; empty if the model does not fit them."""
    from ray_train_geo.planning.pipeline_mix import best_mix  # OR-tools: slow to import

    chosen = problem.topology.with_devices(problem.topology.devices[d] for d in devices)
    part = Problem(chosen, problem.job, problem.dims, problem.options)
    try:
        mix = best_mix(part)
    except PlanError:
        return ()
    # Neighbours in the list are near each other: hand them out in order.
    left = {c: list(reversed(members)) for c, members in enumerate(mix.classes)}
    chains = [
        Chain(tuple(devices[left[c].pop()] for c in kind.devices))
        for kind in mix.pipelines
        for _ in range(kind.multiplicity)
    ]
    return tuple(chains)
