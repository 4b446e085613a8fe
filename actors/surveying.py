"""Measures the links between a crew's nodes: round trips of all, bandwidths as time permits.

Several workers measure at once, none of them disturbed by another (``cluster.probing``).  Nodes of
one machine are not worth it, and get the bandwidth of the default link.
"""

from __future__ import annotations

from collections.abc import Mapping

from ray_train_geo.actors.crew import Crew, Spot
from ray_train_geo.cluster.probing import Reading, hurried, spread
from ray_train_geo.cluster.topology import Link
from ray_train_geo.transport.reading import reading_s

__all__ = ["survey"]

_SENDING_S = 0.3

Pair = tuple[str, str]


def survey(crew: Crew, others: Mapping[str, Spot], flows: int, budget_s: float) -> dict[Pair, Link]:
    """The links between all pairs of the crew's nodes, and between them and ``others``.

    Args:
        others: nodes of workers that are not the crew's, and are not asked; by node.
        flows: that a link's messages may be spread over: more than one, and what one alone
            carries is told apart from what the path does.
        budget_s: for bandwidths, in seconds; 0 measures round trips alone.

    Raises:
        LostWorkerError: a worker is gone, or can't reach another.
    """
    ours = crew.spots()
    spots = {**others, **ours}
    if len(spots) < 2:
        return {}
    places = [spot.place for spot in spots.values()]
    trips = _round_trips(crew, ours, spots)
    readings: dict[Pair, Reading] = {}
    chosen = hurried(places, ours, lambda p: reading_s(trips[p], flows, _SENDING_S), budget_s)
    for pairs in chosen:
        at = {ours[a].device: (a, b) for a, b in pairs}
        said = crew.ask(
            "read",
            {d: (spots[b].station, flows, _SENDING_S) for d, (_, b) in at.items()},
            "measuring the bandwidth between nodes",
        )
        readings |= {pair: said[device] for device, pair in at.items()}
    both = trips | {(b, a): trip for (a, b), trip in trips.items() if (b, a) not in trips}
    return spread(places, readings, both)


def _round_trips(
    crew: Crew, ours: Mapping[str, Spot], spots: Mapping[str, Spot]
) -> dict[Pair, float]:
    targets = {node: spot.station for node, spot in spots.items()}
    arguments = {
        spot.device: ({n: at for n, at in targets.items() if n != node},)
        for node, spot in ours.items()
    }
    answers = crew.ask("ping", arguments, "pinging between nodes")
    return {
        (node, other): trip_s
        for node, spot in ours.items()
        for other, trip_s in answers[spot.device].items()
    }
