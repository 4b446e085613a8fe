"""Which groups of ranks a plan needs, and joining them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import permutations

from ray_train_geo.cluster.topology import Topology
from ray_train_geo.model.catalog import ModelDims, parameter_shapes
from ray_train_geo.planning.islands import islands
from ray_train_geo.planning.plan import Plan
from ray_train_geo.spec_local_sgd import LocalSGDSpec
from ray_train_geo.training.buckets import holders_of
from ray_train_geo.transport.base import Transport

__all__ = ["WORLD", "Group", "flows_of", "group_name", "groups_of", "join_groups", "on_hosts"]

WORLD = "world"


@dataclass(frozen=True, slots=True)
class Group:
    """Ranks that talk to each other; a member's rank in the group is its place in ``members``."""

    name: str
    members: tuple[int, ...]


def groups_of(plan: Plan, dims: ModelDims, local_sgd: LocalSGDSpec | None = None) -> list[Group]:
    """All groups of ``plan``, in one order for all ranks: so nobody waits in a circle to join.

    A pipeline's edge is two groups, one a direction, each with its sender first: on a GPU the
    messages of one group are one queue, and two directions in one queue could block each other.

    Under local SGD gradients are summed inside of islands, and pseudogradients over all holders.
    """
    groups = []
    for p, pipeline in enumerate(plan.pipelines):
        for s in range(len(pipeline.stages) - 1):
            here, there = plan.rank(p, s), plan.rank(p, s + 1)
            groups.append(Group(f"activations/{here}", (here, there)))
            groups.append(Group(f"gradients/{there}", (there, here)))
    holders = {holders_of(name, plan, dims) for name in parameter_shapes(dims)}
    among = [tuple(range(plan.world_size))]
    if local_sgd is not None:
        among = [island.ranks for island in islands(plan, local_sgd.across)]
        groups += [Group(group_name("island", ranks), ranks) for ranks in among]
        groups += [Group(group_name("merge", ranks), ranks) for ranks in sorted(holders)]
    summing = {tuple(r for r in ranks if r in some) for ranks in holders for some in among}
    groups += [Group(group_name("sync", ranks), ranks) for ranks in sorted(summing)]
    groups = [group for group in groups if len(group.members) > 1]
    groups.append(Group(WORLD, tuple(range(plan.world_size))))
    return groups


def group_name(what: str, members: Sequence[int]) -> str:
    """``what`` is ``sync`` (gradients), ``merge`` (pseudogradients) or ``island`` (commits)."""
    return f"{what}/{'-'.join(map(str, members))}"


def on_hosts(name: str) -> bool:
    """Whether the group's tensors are in host memory wherever the stages compute."""
    return name == WORLD or name.startswith(("island/", "merge/"))


def flows_of(
    plan: Plan, dims: ModelDims, topology: Topology, local_sgd: LocalSGDSpec | None = None
) -> dict[str, int]:
    """How many flows carry each group, where it is more than one: as many as its links have."""
    devices = [topology.device(device.id) for device in plan.devices]
    found = {}
    for group in groups_of(plan, dims, local_sgd):
        flows = max(
            (
                topology.link(devices[a], devices[b]).flows
                for a, b in permutations(group.members, 2)
            ),
            default=1,
        )
        # The commit's messages are small.
        if flows > 1 and group.name != WORLD and not group.name.startswith("island/"):
            found[group.name] = flows
    return found


def join_groups(
    plan: Plan,
    dims: ModelDims,
    rank: int,
    connect: Callable[[Group, int], Transport],
    local_sgd: LocalSGDSpec | None = None,
) -> dict[str, Transport]:
    """Join all groups that ``rank`` is a member of: name -> transport.

    One after the other: who waits for others keeps the store's connection to itself, and a
    connection a group is what many workers at once can't have (torch looks up the name of each).

    Args:
        connect: joins one group with the given rank in it, and returns when all have joined.
    """
    return {
        group.name: connect(group, group.members.index(rank))
        for group in groups_of(plan, dims, local_sgd)
        if rank in group.members
    }
