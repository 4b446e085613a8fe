"""Islands of local SGD: pipelines that take every step together, and alone (pure)."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from ray_train_geo.planning.plan import Plan
from ray_train_geo.spec_local_sgd import Across

__all__ = ["Island", "islands", "together"]


@dataclass(frozen=True, slots=True)
class Island:
    """All in ascending order.

    Args:
        pipelines: numbers in the plan.
        ranks: of all their stages.
        microbatches: how many of a step's the island computes.
    """

    pipelines: tuple[int, ...]
    ranks: tuple[int, ...]
    microbatches: int


def islands(plan: Plan, across: Across) -> tuple[Island, ...]:
    """The islands of ``plan``, by their first pipelines.

    ``regions``: pipelines whose stages are in the same regions are one island.
    """
    regions = []
    for p, pipeline in enumerate(plan.pipelines):
        first = plan.rank(p, 0)
        devices = plan.devices[first : first + len(pipeline.stages)]
        regions.append(frozenset(d.region for d in devices))
    return tuple(
        Island(
            tuple(pipelines),
            tuple(role.rank for role in plan.roles() if role.pipeline in pipelines),
            sum(plan.pipelines[p].microbatches for p in pipelines),
        )
        for pipelines in together(regions, across)
    )


def together(regions: Sequence[Hashable], across: Across) -> list[list[int]]:
    """Numbers of the pipelines of each island.

    Args:
        regions: those of each pipeline.
    """
    if across == "pipelines":
        return [[p] for p in range(len(regions))]
    found: dict[Hashable, list[int]] = {}
    for p, where in enumerate(regions):
        found.setdefault(where, []).append(p)
    return list(found.values())
