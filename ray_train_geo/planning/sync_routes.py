"""Who hands what to whom when a group sums its gradients (pure).

The flat gradients of a group are cut into pieces.  In the *reduce* half of a sum every member hands
each piece on, summed up as far as it has it, until one member has it whole; the *spread* half goes
the same way backwards.  Rounds follow one another::

    sharded PS     0 ⇄ 1 ⇄ 2 ⇄ 3 ⇄ 0 ...     one round: everybody's piece 2 to member 2

    tree           0 ◀ 1   2 ◀ 3             two sites of two, one piece: inside of them,
                   0 ◀───── 2                and then the leaders (binomial trees)

    hierarchical   0 ⇄ 1   2 ⇄ 3             two sites of two, four pieces: half of them to each
                   0 ⇄ 2   1 ⇄ 3             member of a site, then one to each member of all

A *site* is a region; in a group of one region it is a node.  (Thakur et al., 2005, have the
collectives; hierarchical ones as in BlueConnect, Cho et al., 2019.)
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import NamedTuple

from ray_train_geo.planning.plan import Plan
from ray_train_geo.spec import GradientSyncName

__all__ = [
    "ROUTED",
    "Route",
    "Transfer",
    "Turn",
    "even_shards",
    "hierarchical",
    "plan_route",
    "plan_shares",
    "route_of",
    "sharded",
    "shards",
    "sites_of",
    "tree",
]

ROUTED: tuple[GradientSyncName, ...] = ("tree", "hierarchical")
"""Modes whose messages depend on where members are."""


class Transfer(NamedTuple):
    """In the reduce half ``source`` hands ``pieces`` (ascending) to ``target``."""

    source: int
    target: int
    pieces: tuple[int, ...]


class Turn(NamedTuple):
    """What a member hands on and gets in a round: the other member -> pieces."""

    gives: Mapping[int, tuple[int, ...]]
    takes: Mapping[int, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Route:
    """The reduce half of a sum; members are counted as in their group.

    Args:
        shares: ``[pieces]``; their parts of the gradients.
        rounds: a member hands a piece on at most once, and gets none of it afterwards.
    """

    shares: tuple[float, ...]
    rounds: tuple[tuple[Transfer, ...], ...]

    def turns(self, member: int) -> list[Turn]:
        """What ``member`` does in each round."""
        return [
            Turn(
                {t.target: t.pieces for t in transfers if t.source == member},
                {t.source: t.pieces for t in transfers if t.target == member},
            )
            for transfers in self.rounds
        ]

    def held(self, member: int) -> tuple[int, ...]:
        """The pieces that ``member`` has whole in the end, ascending."""
        given, got = set[int](), set[int]()
        for turn in self.turns(member):
            given.update(*turn.gives.values())
            got.update(*turn.takes.values())
        return tuple(sorted(got - given))


def sharded(shares: Sequence[float]) -> Route:
    """Each member sums a piece for all, as large as its share says; some may be 0."""
    members = range(len(shares))
    return Route(
        tuple(shares),
        (tuple(Transfer(i, j, (j,)) for i in members for j in members if i != j and shares[j]),),
    )


@lru_cache(maxsize=1024)
def tree(sites: tuple[Hashable, ...]) -> Route:
    """All to the first member of each site, then all to the first of all; one piece.

    Args:
        sites: ``[members]``.
    """
    members = _by_site(sites)
    inside = [_binomial(mine) for mine in members]
    rounds = [
        tuple(transfer for mine in inside if depth < len(mine) for transfer in mine[depth])
        for depth in range(max(map(len, inside)))
    ]
    return Route((1.0,), (*rounds, *_binomial([mine[0] for mine in members])))


@lru_cache(maxsize=1024)
def hierarchical(sites: tuple[Hashable, ...]) -> Route:
    """Within each site every member takes over its part; then sites exchange theirs.

    The largest site has ``n`` members: then there are ``n`` *lanes*, and every site has a holder
    for each, who may hold several.  A lane's pieces are summed up at different sites.

    Args:
        sites: ``[members]``.
    """
    members = _by_site(sites)
    lanes = max(map(len, members))
    in_lane = len(sites) // lanes  # so there are no more pieces than members

    def holder(site: int, lane: int) -> int:
        return members[site][lane * len(members[site]) // lanes]

    inside: dict[tuple[int, int], list[int]] = {}
    between: dict[tuple[int, int], list[int]] = {}
    for piece in range(lanes * in_lane):
        lane, home = piece // in_lane, piece % len(members)
        for site, mine in enumerate(members):
            here = holder(site, lane)
            for member in mine:
                if member != here:
                    inside.setdefault((member, here), []).append(piece)
            if site != home:
                between.setdefault((here, holder(home, lane)), []).append(piece)
    rounds = tuple(
        tuple(Transfer(*pair, tuple(pieces)) for pair, pieces in sorted(one.items()))
        for one in (inside, between)
        if one
    )
    return Route((1 / (lanes * in_lane),) * (lanes * in_lane), rounds)


def _by_site(sites: Sequence[Hashable]) -> list[list[int]]:
    found: dict[Hashable, list[int]] = {}
    for member, site in enumerate(sites):
        found.setdefault(site, []).append(member)
    return list(found.values())


def _binomial(members: Sequence[int]) -> list[tuple[Transfer, ...]]:
    """All to the first of ``members``, in a round for each doubling of those who have given."""
    rounds, step = [], 1
    while step < len(members):
        givers = range(step, len(members), 2 * step)
        rounds.append(tuple(Transfer(members[i], members[i - step], (0,)) for i in givers))
        step *= 2
    return rounds


def route_of(
    mode: GradientSyncName, sites: Sequence[Hashable], shares: Sequence[float] | None = None
) -> Route:
    """The route of a group; a ring has none.

    Args:
        sites: ``[members]``.
        shares: of the members of a sharded PS; by default all alike.
    """
    members = len(sites)
    match mode:
        case "tree":
            return tree(tuple(sites))
        case "hierarchical":
            return hierarchical(tuple(sites))
        case "central_ps":
            return sharded((1.0,) + (0.0,) * (members - 1))
        case "sharded_ps":
            return sharded(shares or (1 / members,) * members)
    raise ValueError(f"{mode} is no route")


def sites_of(regions: Sequence[Hashable], nodes: Sequence[Hashable]) -> tuple[Hashable, ...]:
    """Each member's site."""
    return tuple(regions if len(set(regions)) > 1 else nodes)


def plan_route(plan: Plan, holders: Sequence[int]) -> Route:
    """The route by which the ranks ``holders`` of ``plan`` sum; alike for all of them."""
    devices = [plan.devices[rank] for rank in holders]
    sites = sites_of([d.region for d in devices], [d.node for d in devices])
    return route_of(plan.gradient_sync, sites, plan_shares(plan, holders))


def plan_shares(plan: Plan, holders: Sequence[int]) -> tuple[float, ...]:
    """Parts of the gradients that the ranks ``holders`` sum for each other in a sharded PS."""
    stages = [stage for pipeline in plan.pipelines for stage in pipeline.stages]
    weights = [stages[rank].shard for rank in holders]
    return tuple(weight / sum(weights) for weight in weights)


def shards(elements: int, shares: Sequence[float]) -> list[int]:
    """``elements`` cut into contiguous runs in proportion to ``shares``, which add up to 1."""
    if min(shares) == max(shares):
        return even_shards(elements, len(shares))
    ends = [round(elements * end) for end in accumulate(shares)]
    return [b - a for a, b in pairwise([0, *ends[:-1], elements])]


def even_shards(elements: int, ranks: int) -> list[int]:
    """``elements`` cut into ``ranks`` contiguous shards that differ by one at most."""
    return [elements // ranks + (rank < elements % ranks) for rank in range(ranks)]
