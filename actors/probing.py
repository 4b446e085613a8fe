"""Measures the network of a live Ray cluster: an agent on each node, in rounds that don't meet."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util import get_node_ip_address
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ray_train_geo.actors.discovery import Node
from ray_train_geo.cluster.probing import Place, Reading, sampled
from ray_train_geo.errors import ClusterError, TransportError
from ray_train_geo.transport.reading import Station, StationServer, read

__all__ = ["probe_nodes"]

_START_S = 120.0
_READ_S = 90.0

Pair = tuple[str, str]


class ProbeAgent:
    """One node's side of the probe."""

    def __init__(self) -> None:
        self._server = StationServer(get_node_ip_address())

    def station(self) -> Station:
        return self._server.station

    def read(self, target: Station, flows: int, seconds: float) -> Reading:
        return read(target, flows, seconds)


def probe_nodes(
    nodes: Sequence[Node],
    flows: int,
    seconds: float,
    most_rounds: int,
    told: Callable[[int, int], None] = lambda done, of: None,
) -> tuple[list[Place], dict[Pair, Reading]]:
    """Measure between ``nodes``, by node ids.

    Args:
        flows, seconds: as :func:`ray_train_geo.transport.reading.read`.
        most_rounds: beyond so many, nodes stand for their regions; see
            :func:`ray_train_geo.cluster.probing.sampled`.
        told: called with the rounds that are done, and of how many.

    Raises:
        ClusterError: a node does not start its agent, or can't reach another.
    """
    names = {node.id: f"{node.hostname} ({node.id[:8]})" for node in nodes}
    agent: Any = ray.remote(ProbeAgent)
    agents = {
        node.id: agent.options(
            num_cpus=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False),
            runtime_env={"env_vars": {"OMP_NUM_THREADS": "1"}},
        ).remote()
        for node in nodes
    }
    try:
        stations: dict[str, Station] = {}
        for node, started in [(n, a.station.remote()) for n, a in agents.items()]:
            with _said(f"no probe started on {names[node]}"):
                stations[node] = ray.get(started, timeout=_START_S)
        places = [Place(n.id, n.region, stations[n.id].address) for n in nodes]
        plan = sampled(places, most_rounds)
        found: dict[Pair, Reading] = {}
        for done, pairs in enumerate(plan):
            told(done, len(plan))
            calls = {
                pair: agents[pair[0]].read.remote(stations[pair[1]], flows, seconds)
                for pair in pairs
            }
            for (source, target), call in calls.items():
                with _said(f"{names[source]} could not measure its way to {names[target]}"):
                    found[source, target] = ray.get(call, timeout=_READ_S)
        told(len(plan), len(plan))
        return places, found
    finally:
        for each in agents.values():
            with contextlib.suppress(RayError):
                ray.kill(each)


@contextlib.contextmanager
def _said(what: str) -> Iterator[None]:
    """Errors of Ray and of the transport, as one message that begins with ``what``."""
    try:
        yield
    except GetTimeoutError:
        raise ClusterError(f"{what}: no answer in time") from None
    except (RayError, TransportError) as e:
        reason = getattr(e, "cause", None) or e
        raise ClusterError(f"{what}: {str(reason).splitlines()[0]}") from None
