"""Which links to measure when, so that no measurement disturbs another, and what they tell.

round 1   a ──▶ b   c ──▶ d          in a round no machine is used twice, nor the way from one
round 2   b ──▶ a   d ──▶ c          region to another
round 3   a ──▶ c   ...
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from ray_train_geo.cluster.topology import DEFAULT_LINK, Link

__all__ = ["Place", "Reading", "hurried", "links_of", "region_links", "rounds", "sampled", "spread"]

_WINDOW_BOUND = 0.8
"""A single flow that gets less than this share of what several get is held up by its window."""


@dataclass(frozen=True, slots=True)
class Place:
    """A node that takes part in a probe.

    Args:
        machine: nodes of one machine share its network card, and are never measured at once.
    """

    node: str
    region: str
    machine: str


@dataclass(frozen=True, slots=True)
class Reading:
    """What was measured from one node to another.

    Args:
        round_trip_s: the shortest.
        flow_bytes_per_s: of one warm TCP flow.
        path_bytes_per_s: of several at once.
        cold_s: from the first byte sent to the last of a first message received, on a fresh flow.
        cold_bytes: that message's size.
    """

    round_trip_s: float
    flow_bytes_per_s: float
    path_bytes_per_s: float
    cold_s: float
    cold_bytes: int

    def link(self) -> Link:
        """The link of the topology that behaves so."""
        path = max(self.path_bytes_per_s, self.flow_bytes_per_s)
        bound = self.flow_bytes_per_s < _WINDOW_BOUND * path
        window = self.flow_bytes_per_s * self.round_trip_s if bound else math.inf
        return Link(self.round_trip_s / 2, path if bound else self.flow_bytes_per_s, window)


Pair = tuple[str, str]


def rounds(places: Sequence[Place], pairs: Iterable[Pair] | None = None) -> list[list[Pair]]:
    """Directed pairs of nodes, in rounds whose measurements don't meet.

    Each pair goes to the first round where its two machines, and the way between its two regions,
    are free (a greedy edge colouring).

    Args:
        pairs: to be measured; None: all that are of two nodes.
    """
    at = {place.node: place for place in places}
    if pairs is None:
        pairs = [(a, b) for a in at for b in at if a != b]
    found: list[list[Pair]] = []
    taken: list[set[Hashable]] = []
    for source, target in pairs:
        uses = _uses(at[source], at[target])
        k = next((k for k, others in enumerate(taken) if not uses & others), len(found))
        if k == len(found):
            found.append([])
            taken.append(set())
        found[k].append((source, target))
        taken[k] |= uses
    return found


def _uses(source: Place, target: Place) -> set[Hashable]:
    uses: set[Hashable] = {source.machine, target.machine}
    if source.region != target.region:
        uses.add((source.region, target.region))
    return uses


def sampled(places: Sequence[Place], most_rounds: int) -> list[list[Pair]]:
    """As :func:`rounds` of all pairs, or of fewer where those are too many.

    Where there are more than ``most_rounds``, as many pairs of nodes stand for each pair of regions
    as the rounds have room for, and at least one.
    """
    every = rounds(places)
    if len(every) <= most_rounds:
        return every
    of_regions: dict[Pair, list[Pair]] = {}
    region = {place.node: place.region for place in places}
    for pair in (pair for found in every for pair in found):
        of_regions.setdefault((region[pair[0]], region[pair[1]]), []).append(pair)
    best = rounds(places, [pairs[0] for pairs in of_regions.values()])
    for each in range(2, max(map(len, of_regions.values())) + 1):
        more = rounds(places, [pair for pairs in of_regions.values() for pair in pairs[:each]])
        if len(more) > most_rounds:
            break
        best = more
    return best


def hurried(
    places: Sequence[Place],
    sources: Collection[str],
    seconds: Callable[[Pair], float],
    budget_s: float,
) -> list[list[Pair]]:
    """The rounds that ``budget_s`` has time for, the most telling first.

    A pair for each two regions comes first, in one direction and then in the other, and then more
    pairs of the same regions.  Nodes of one machine are not measured.

    Args:
        sources: nodes that can measure; pairs of two others are left out.
        seconds: what measuring a pair takes.
    """
    at = {place.node: place for place in places}
    turn: dict[Hashable, int] = {}
    order: dict[Pair, tuple[int, int]] = {}
    for a, b in combinations(at, 2):
        if at[a].machine == at[b].machine:
            continue
        regions = frozenset((at[a].region, at[b].region))
        turn[regions] = turn.get(regions, 0) + 1
        ways = [pair for pair in ((a, b), (b, a)) if pair[0] in sources]
        order |= {pair: (turn[regions], way) for way, pair in enumerate(ways)}
    found = []
    for some in rounds(places, sorted(order, key=order.__getitem__)):
        budget_s -= max(map(seconds, some))
        if budget_s < 0:
            break
        found.append(some)
    return found


def spread(
    places: Sequence[Place], readings: Mapping[Pair, Reading], round_trips_s: Mapping[Pair, float]
) -> dict[Pair, Link]:
    """The links of all pairs whose round trip is known; what was not measured is as its like.

    That is: as the way back, as other pairs of the two regions, or as the default link.
    """
    region = {place.node: place.region for place in places}
    measured = links_of(readings)
    typical = region_links(places, measured)
    found = {}
    for (a, b), trip_s in round_trips_s.items():
        there, back = (region[a], region[b]), (region[b], region[a])
        known = (measured.get((a, b)), measured.get((b, a)), typical.get(there), typical.get(back))
        link = next((link for link in known if link is not None), DEFAULT_LINK)
        found[a, b] = replace(link, latency_s=trip_s / 2)
    return found


def links_of(readings: Mapping[Pair, Reading]) -> dict[Pair, Link]:
    """The link of each pair of nodes."""
    return {pair: reading.link() for pair, reading in readings.items()}


def region_links(places: Sequence[Place], links: Mapping[Pair, Link]) -> dict[Pair, Link]:
    """The link between nodes of each pair of regions: medians over those that were measured."""
    region = {place.node: place.region for place in places}
    groups: dict[Pair, list[Link]] = {}
    for (source, target), link in links.items():
        groups.setdefault((region[source], region[target]), []).append(link)
    return {
        pair: Link(
            statistics.median(link.latency_s for link in group),
            statistics.median(link.bandwidth_bytes_per_s for link in group),
            statistics.median(link.window_bytes for link in group),
        )
        for pair, group in groups.items()
    }
