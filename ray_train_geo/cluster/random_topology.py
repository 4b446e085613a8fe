"""Random topologies that could exist: for tests, and to judge a planner on what it never saw.

Regions are points of a sphere, all over it or crowded together.  Latency and bandwidth follow the
distance as DT-FM's 46 pairs of cloud regions do (``data/wan_links.csv``): 4 ms and a millisecond
for 76 km, and bandwidth of 70 Gbit/s over the milliseconds, at most 1.25 Gbit/s.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations, permutations

import numpy as np
from numpy.typing import NDArray

from ray_train_geo.cluster.gpus import gpu
from ray_train_geo.cluster.topology import Device, Link, MarketType, Topology, Uplink
from ray_train_geo.cluster.validate_topology import validate_topology
from ray_train_geo.errors import SpecError

__all__ = ["random_topology"]

_GBPS = 1e9 / 8  # bytes per second
_EARTH_RADIUS_KM = 6371.0
_KM_PER_MS = 76.0
_LEAST_WAN_MS = 4.0
_GBIT = 0.070  # bandwidth times latency of a flow far away
_WAN_GBPS = 1.25
_WAN_WINDOW_BYTES = 16.6e6

_LATENCIES_MS = (0.1, 0.5, 1.0, 5.0)
_NICS_GBPS = (10.0, 25.0, 100.0)
_INSIDE_NODE_GBPS = (100.0, 200.0, 400.0)
_FLOWS_PER_UPLINK = (1.0, 2.0, 4.0)


@dataclass(frozen=True, slots=True)
class _Region:
    """What the nodes of one region have in common."""

    name: str
    position: NDArray[np.float64]
    types: tuple[str, ...]
    market_type: MarketType
    inside: Link
    inside_node: Link
    nic: Uplink


def random_topology(
    seed: int,
    devices: int = 64,
    regions: int = 4,
    gpus_per_node: Sequence[int] = (1, 2, 4, 8),
    types: Sequence[str] = ("V100-16G", "T4", "A10G", "A40", "A100-40G", "A100-80G"),
    noise: float = 0.0,
) -> Topology:
    """A topology that depends on the arguments alone.

    Args:
        seed: any integer.
        devices: how many, exactly.
        regions: how many at most; each has a device at least.
        gpus_per_node: sizes of nodes; the last node of a region may be smaller.
        types: names of the catalog; a region has one or two of them, a node has one.
        noise: 0.1 changes every link by up to 10% on its own: that of each pair of nodes, and
            there otherwise than back.  So it takes as many links as there are pairs of nodes.

    Raises:
        SpecError: an argument is out of range, or a type is not in the catalog.
    """
    if devices < 1 or regions < 1 or not gpus_per_node or min(gpus_per_node) < 1 or not types:
        raise SpecError("a random topology needs at least one device, region, node size and type")
    if not 0 <= noise < 1:
        raise SpecError(f"noise is {noise}: it must be at least 0 and less than 1")
    rng = np.random.default_rng([int(seed < 0), abs(seed)])
    sizes = _sizes(rng, devices, min(regions, devices))
    crowding = rng.uniform(-1.0, 0.95)  # cosine of the angle that all regions lie within
    made = [_region(rng, f"r{i}", crowding, types) for i in range(len(sizes))]
    placed = tuple(
        device
        for region, size in zip(made, sizes, strict=True)
        for device in _devices(rng, region, size, gpus_per_node)
    )
    topology = _network(rng, made, placed)
    if noise:
        topology = _noisy(rng, topology, noise)
    validate_topology(topology)
    return topology


def _sizes(rng: np.random.Generator, devices: int, regions: int) -> list[int]:
    """Devices of each region, at least one."""
    cuts = np.sort(rng.permutation(devices - 1)[: regions - 1] + 1).tolist()
    return [b - a for a, b in zip([0, *cuts], [*cuts, devices], strict=True)]


def _region(rng: np.random.Generator, name: str, crowding: float, types: Sequence[str]) -> _Region:
    height, angle = rng.uniform(crowding, 1.0), rng.uniform(0.0, 2 * math.pi)
    across = math.sqrt(1 - height * height)
    position = np.array([across * math.cos(angle), across * math.sin(angle), height])
    nic_gbps = float(rng.choice(_NICS_GBPS))
    inside_gbps = nic_gbps * float(rng.choice((0.2, 0.5, 1.0)))
    kinds = rng.permutation(len(types))[: 1 + int(rng.random() < 0.3)]
    return _Region(
        name=name,
        position=position,
        types=tuple(types[i] for i in kinds),
        market_type="spot" if rng.random() < 0.5 else "on-demand",
        inside=Link(float(rng.choice(_LATENCIES_MS)) / 1e3, inside_gbps * _GBPS),
        inside_node=Link(0.0, float(rng.choice(_INSIDE_NODE_GBPS)) * _GBPS),
        nic=Uplink(nic_gbps * _GBPS, nic_gbps * _GBPS),
    )


def _devices(
    rng: np.random.Generator, region: _Region, count: int, gpus_per_node: Sequence[int]
) -> list[Device]:
    made: list[Device] = []
    node = 0
    while len(made) < count:
        size = min(gpus_per_node[int(rng.integers(len(gpus_per_node)))], count - len(made))
        kind = gpu(region.types[int(rng.integers(len(region.types)))])
        name = f"{region.name}-{node}"
        made += [
            kind.device(f"{name}/{i}", name, region.name, market_type=region.market_type)
            for i in range(size)
        ]
        node += 1
    return made


def _network(
    rng: np.random.Generator, regions: Sequence[_Region], devices: tuple[Device, ...]
) -> Topology:
    links = {(r.name, r.name): r.inside for r in regions}
    uplinks: dict[tuple[str, str], float] = {}
    shared = rng.random() < 0.5
    for a, b in combinations(regions, 2):
        link = _wan(rng, a, b)
        links[a.name, b.name] = links[b.name, a.name] = link
        if shared and rng.random() < 0.5:
            rate = link.bandwidth_bytes_per_s * float(rng.choice(_FLOWS_PER_UPLINK))
            uplinks[a.name, b.name] = uplinks[b.name, a.name] = rate
    by_name = {r.name: r for r in regions}
    node_of = {d.node: by_name[d.region] for d in devices}
    gpus = Counter(d.node for d in devices)
    return Topology(
        devices,
        node_links={(n, n): r.inside_node for n, r in node_of.items() if gpus[n] > 1},
        region_links=links,
        node_uplinks={n: r.nic for n, r in node_of.items()},
        region_uplinks=uplinks,
        default_link=None,
    )


def _wan(rng: np.random.Generator, a: _Region, b: _Region) -> Link:
    cosine = min(1.0, max(-1.0, float(a.position @ b.position)))
    km = _EARTH_RADIUS_KM * math.acos(cosine)
    # Rounded, so that no machine's last bits of a cosine are seen.
    latency_s = round((_LEAST_WAN_MS + km / _KM_PER_MS) / 1e3, 4)
    gbps = round(min(_WAN_GBPS, _GBIT / latency_s * rng.uniform(0.85, 1.15)), 3)
    return Link(latency_s, gbps * _GBPS, _WAN_WINDOW_BYTES)


def _noisy(rng: np.random.Generator, topology: Topology, noise: float) -> Topology:
    """Every link changed on its own: between regions, and between any two nodes."""

    def changed(link: Link) -> Link:
        slower, narrower = rng.uniform(1 - noise, 1 + noise, 2)
        return replace(
            link,
            latency_s=link.latency_s * float(slower),
            bandwidth_bytes_per_s=link.bandwidth_bytes_per_s * float(narrower),
        )

    first = {d.node: d for d in reversed(topology.devices)}
    between = {
        (a, b): changed(topology.link(first[a], first[b])) for a, b in permutations(first, 2)
    }
    return replace(
        topology,
        node_links={**topology.node_links, **between},
        region_links={pair: changed(link) for pair, link in topology.region_links.items()},
    )
