"""Which device is which stage, by rule: a pipeline stays in one region and on few nodes if it can.

Regions hand out their fastest nodes first, whole nodes one behind the other, so that neighbouring
stages are close and a pipeline's devices are alike.  Of equally fast regions the largest is used up
first, so that pipelines share a region where they can.  A pipeline that fits into no region any
more starts in the one with most devices left and goes on to the closest one, again and again::

    ohio      [a a a a][b b b b][c]   pipelines a, b, c of 4: a and b in ohio; c starts in
    virginia  [c c c]                 virginia, which has more left, and ends in ohio
"""

from __future__ import annotations

from collections.abc import Sequence

from ray_train_geo.cluster.topology import Device, Topology

__all__ = ["place"]


def place(
    topology: Topology, depths: Sequence[int], message_bytes: float
) -> tuple[tuple[Device, ...], ...]:
    """A chain of ``depths[i]`` devices for each pipeline ``i``; deepest pipelines choose first.

    Args:
        message_bytes: size of one activation message; it decides which region is closest.

    Raises:
        ValueError: fewer devices than stages.
    """
    if sum(depths) > len(topology.devices):
        raise ValueError(f"{sum(depths)} stages need more than {len(topology.devices)} devices")
    pools = _pools(topology.devices)
    chains: dict[int, tuple[Device, ...]] = {}
    for i in sorted(range(len(depths)), key=lambda i: (-depths[i], i)):
        chains[i] = tuple(_take(topology, pools, depths[i], message_bytes))
    return tuple(chains[i] for i in range(len(depths)))


def _pools(devices: Sequence[Device]) -> dict[str, list[Device]]:
    """Devices by region, largest region first; in it node by node, fastest, then largest first."""
    nodes: dict[tuple[str, str], list[Device]] = {}
    for d in devices:
        nodes.setdefault((d.region, d.node), []).append(d)

    def order(node: tuple[str, str]) -> tuple[str, float, int, str]:
        fastest = max(d.flops_per_s for d in nodes[node])
        return node[0], -fastest, -len(nodes[node]), node[1]

    pools: dict[str, list[Device]] = {}
    for node in sorted(nodes, key=order):
        pools.setdefault(node[0], []).extend(
            sorted(nodes[node], key=lambda d: (-d.flops_per_s, d.id))
        )
    return dict(sorted(pools.items(), key=lambda item: (-len(item[1]), item[0])))


def _take(
    topology: Topology, pools: dict[str, list[Device]], depth: int, message_bytes: float
) -> list[Device]:
    """Remove ``depth`` devices from ``pools`` and return them as a chain."""
    whole = [region for region, pool in pools.items() if len(pool) >= depth]
    if whole:
        # min takes the first of equals: the largest region.
        region = min(whole, key=lambda r: -sum(d.flops_per_s for d in pools[r][:depth]))
        return _pop(pools, region, depth)
    chain: list[Device] = []
    while len(chain) < depth:
        regions = [region for region, pool in pools.items() if pool]
        if chain:
            end = chain[-1]
            region = min(
                regions, key=lambda r: (_round_trip_s(topology, end, pools[r][0], message_bytes), r)
            )
        else:
            region = min(regions, key=lambda r: (-len(pools[r]), r))
        chain += _pop(pools, region, depth - len(chain))
    return chain


def _pop(pools: dict[str, list[Device]], region: str, count: int) -> list[Device]:
    taken, pools[region] = pools[region][:count], pools[region][count:]
    return taken


def _round_trip_s(topology: Topology, a: Device, b: Device, message_bytes: float) -> float:
    there, back = topology.link(a, b), topology.link(b, a)
    return there.transfer_s(message_bytes) + back.transfer_s(message_bytes)
