"""Which groups of ranks a plan needs, and joining them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ray_train_geo.model.catalog import ModelDims, parameter_shapes
from ray_train_geo.planning.plan import Plan
from ray_train_geo.training.buckets import holders_of
from ray_train_geo.transport.base import Transport

__all__ = ["WORLD", "Group", "groups_of", "join_groups"]

WORLD = "world"


@dataclass(frozen=True, slots=True)
class Group:
    """Ranks that talk to each other; a member's rank in the group is its place in ``members``."""

    name: str
    members: tuple[int, ...]


def groups_of(plan: Plan, dims: ModelDims) -> list[Group]:
    """All groups of ``plan``, in one order for all ranks: so nobody waits in a circle to join.

    A pipeline's edge is two groups, one a direction, each with its sender first: on a GPU the
    messages of one group are one queue, and two directions in one queue could block each other.
    """
    groups = []
    for p, pipeline in enumerate(plan.pipelines):
        for s in range(len(pipeline.stages) - 1):
            here, there = plan.rank(p, s), plan.rank(p, s + 1)
            groups.append(Group(f"activations/{here}", (here, there)))
            groups.append(Group(f"gradients/{there}", (there, here)))
    holders = {holders_of(name, plan, dims) for name in parameter_shapes(dims)}
    groups += [
        Group("sync/" + "-".join(map(str, ranks)), ranks)
        for ranks in sorted(holders)
        if len(ranks) > 1
    ]
    groups.append(Group(WORLD, tuple(range(plan.world_size))))
    return groups


def join_groups(
    plan: Plan, dims: ModelDims, rank: int, connect: Callable[[Group, int], Transport]
) -> dict[str, Transport]:
    """Join all groups that ``rank`` is a member of: name -> transport.

    Args:
        connect: joins one group with the given rank in it, and returns when all have joined.
    """
    return {
        group.name: connect(group, group.members.index(rank))
        for group in groups_of(plan, dims)
        if rank in group.members
    }
