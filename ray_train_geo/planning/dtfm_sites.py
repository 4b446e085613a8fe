"""Sites: classes that are alike to all others, and how a group's devices spread over them.

The nodes of a region are a *site*: each has the same links to the world, and one kind of link to
the other nodes.  Nodes with the same link inside are a *family*, whatever their sizes::

    site ohio: family of nodes a (4 devices), b (2), c (2); family of node d (2), slower inside
    three devices of ohio in a group:  3 | 2+1 | 1+1+1, each part in a or b or c, or in d

A part's exchange of gradients depends on its family and on how large it is, not on its node.  So
a *spread* of devices is a partition into parts for each family, and there are few.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ray_train_geo.planning.dtfm_classes import ClassProblem

__all__ = ["Site", "Spread", "sites_of"]


@dataclass(frozen=True, slots=True)
class Spread:
    """How devices of one site are split over its nodes.

    Args:
        parts: ``[families]``; for each family its parts, largest first.
        exchange_s: what the slowest of the devices takes for gradients inside the site.
    """

    parts: tuple[tuple[int, ...], ...]
    exchange_s: float


@dataclass(frozen=True, slots=True)
class Site:
    """Classes that no class outside can tell apart.

    Args:
        families: classes with one kind of link inside, the largest first.
        sizes: ``[families]``; how many devices each of their classes has.
        own_sync_s: ``[families]``; between two devices of a class.
        inside_sync_s: between two of its classes, 0 if there is one only.
    """

    families: tuple[tuple[int, ...], ...]
    sizes: tuple[tuple[int, ...], ...]
    own_sync_s: tuple[float, ...]
    inside_sync_s: float

    @property
    def classes(self) -> tuple[int, ...]:
        return tuple(c for family in self.families for c in family)

    @property
    def devices(self) -> int:
        return sum(map(sum, self.sizes))

    def spreads(self, count: int, most_s: float) -> Iterator[Spread]:
        """All spreads of ``count`` devices whose exchange takes up to ``most_s``."""
        exchange_s = [
            [self.inside_sync_s * (count - part) + own_s * (part - 1) for part in range(count + 1)]
            for own_s in self.own_sync_s
        ]

        def over(family: int, left: int) -> Iterator[tuple[tuple[int, ...], ...]]:
            if family == len(self.families):
                if left == 0:
                    yield ()
                return
            allowed = [part for part in range(left, 0, -1) if exchange_s[family][part] <= most_s]
            for parts in _partitions(self.sizes[family], allowed, left):
                for others in over(family + 1, left - sum(parts)):
                    yield parts, *others

        for parts in over(0, count):
            slowest_s = max(
                exchange_s[family][part] for family, inside in enumerate(parts) for part in inside
            )
            yield Spread(parts, slowest_s)


def sites_of(problem: ClassProblem) -> tuple[Site, ...]:
    """The sites of ``problem``, in the order of their first classes."""
    found: list[list[int]] = []
    for c in range(len(problem.sizes)):
        site = next((s for s in found if _alike(problem, s[0], c)), None)
        if site is None:
            found.append([c])
        else:
            site.append(c)
    return tuple(_site(problem, classes) for classes in found)


def _alike(problem: ClassProblem, c: int, d: int) -> bool:
    others = [x for x in range(len(problem.sizes)) if x not in (c, d)]
    return all(
        np.array_equal(costs[c, others], costs[d, others])
        for costs in (problem.sync_s, problem.hop_s)
    )


def _site(problem: ClassProblem, classes: Sequence[int]) -> Site:
    families: dict[tuple[float, float], list[int]] = {}
    for c in classes:
        if problem.sizes[c] > 1:
            own = float(problem.sync_s[c, c]), float(problem.hop_s[c, c])
            families.setdefault(own, []).append(c)
    singles = [c for c in classes if problem.sizes[c] == 1]  # no link inside: fit any family
    if singles:
        own = next(iter(families), (0.0, 0.0))
        families.setdefault(own, []).extend(singles)
    members = [sorted(f, key=lambda c: (-problem.sizes[c], c)) for f in families.values()]
    return Site(
        families=tuple(map(tuple, members)),
        sizes=tuple(tuple(problem.sizes[c] for c in family) for family in members),
        own_sync_s=tuple(own for own, _ in families),
        inside_sync_s=float(problem.sync_s[classes[0], classes[1]]) if len(classes) > 1 else 0.0,
    )


def _partitions(
    sizes: Sequence[int], allowed: Sequence[int], most: int
) -> Iterator[tuple[int, ...]]:
    """All multisets of ``allowed`` parts (largest first), up to ``most`` in all, that fit."""
    yield ()
    if not sizes:
        return
    for i, part in enumerate(allowed):
        if part <= min(most, sizes[0]):
            for rest in _partitions(sizes[1:], allowed[i:], most - part):
                yield part, *rest
