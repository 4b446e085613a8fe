"""From a topology to a lab's network: which nodes are hosts, and how slow is what."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from itertools import chain, permutations, zip_longest

from ray_train_geo.cluster.topology import Device, Link, Topology, Uplink
from ray_train_geo.errors import SpecError
from ray_train_geo.lab.fabric import Shape
from ray_train_geo.lab.network import Host, Network, Shared
from ray_train_geo.planning.link_table import LinkTable

__all__ = ["MOST_HOSTS", "network", "some_nodes"]

Pair = tuple[int, int]

MOST_HOSTS = 250


def some_nodes(topology: Topology, hosts: int | None = None, scale: float = 1.0) -> Topology:
    """``hosts`` nodes of a topology, one device each, spread evenly over its regions.

    Args:
        hosts: how many. None: all nodes.
        scale: what all bandwidths and windows are multiplied by, so that a small model loads the
            links as a large one would; latencies stay.

    Raises:
        SpecError: more hosts than nodes, none at all, or a scale that is none.
    """
    first_of: dict[str, Device] = {}
    for device in topology.devices:
        first_of.setdefault(device.node, device)
    if not math.isfinite(scale) or scale <= 0:
        raise SpecError(f"scale {scale:g}: bandwidths are multiplied by it, so it must be above 0")
    count = len(first_of) if hosts is None else hosts
    if not 1 <= count <= min(len(first_of), MOST_HOSTS):
        raise SpecError(
            f"{count} hosts: the topology has {len(first_of)} nodes, and a lab at most {MOST_HOSTS}"
        )
    by_region: dict[str, list[Device]] = {}
    for device in first_of.values():
        by_region.setdefault(device.region, []).append(device)
    turns: Iterable[Device | None] = chain.from_iterable(zip_longest(*by_region.values()))
    chosen = {d.node: d for d in [d for d in turns if d is not None][:count]}
    regions = list(by_region)
    ordered = sorted(chosen.values(), key=lambda d: regions.index(d.region))
    kept = {d.region for d in ordered}

    def slower(link: Link) -> Link:
        return dataclasses.replace(
            link,
            bandwidth_bytes_per_s=link.bandwidth_bytes_per_s * scale,
            window_bytes=link.window_bytes * scale,
        )

    return Topology(
        tuple(dataclasses.replace(d, id=f"{d.node}/0") for d in ordered),
        node_links={
            (a, b): slower(link)
            for (a, b), link in topology.node_links.items()
            if a != b and a in chosen and b in chosen
        },
        region_links={
            pair: slower(link)
            for pair, link in topology.region_links.items()
            if kept.issuperset(pair)
        },
        node_uplinks={
            node: Uplink(nic.out_bytes_per_s * scale, nic.in_bytes_per_s * scale)
            for node, nic in topology.node_uplinks.items()
            if node in chosen
        },
        region_uplinks={
            pair: rate * scale
            for pair, rate in topology.region_uplinks.items()
            if kept.issuperset(pair)
        },
        default_link=topology.default_link and slower(topology.default_link),
    )


def network(topology: Topology) -> Network:
    """The lab for a topology with one device a node.

    A NIC that the topology does not name is as fast as the fastest of its links, as the planner
    assumes.

    Raises:
        SpecError: two nodes have no link.
    """
    devices = topology.devices
    table = LinkTable.of(topology)
    hosts = tuple(
        Host(d.node, f"10.90.{i // 250}.{i % 250 + 1}", d.region, d.zone, d.market_type)
        for i, d in enumerate(devices)
    )
    pairs = list(permutations(range(len(devices)), 2))
    links = {}
    for a, b in pairs:
        try:
            link = topology.link(devices[a], devices[b])
        except KeyError:
            raise SpecError(
                f"no link from {devices[a].node} to {devices[b].node}: name one in the topology, "
                "or a default link"
            ) from None
        links[a, b] = Shape(link.latency_s, link.bandwidth_bytes_per_s, link.flow_bytes_per_s)

    def shared(name: str, seconds_per_byte: float, on_it: Iterable[Pair]) -> Iterable[Shared]:
        found = tuple(on_it)
        if seconds_per_byte > 0 and found:
            yield Shared(name, float(1 / seconds_per_byte), found)

    out, into = table.out_seconds_per_byte, table.in_seconds_per_byte
    everything: list[Shared] = []
    for n, name in enumerate(table.nodes):
        everything += shared(f"NIC out of {name}", out[n], (p for p in pairs if p[0] == n))
    for r, q in permutations(range(len(table.regions)), 2):
        everything += shared(
            f"uplink from {table.regions[r]} to {table.regions[q]}",
            table.uplink_seconds_per_byte[r, q],
            (p for p in pairs if (table.region[p[0]], table.region[p[1]]) == (r, q)),
        )
    for n, name in enumerate(table.nodes):
        everything += shared(f"NIC into {name}", into[n], (p for p in pairs if p[1] == n))
    return Network(hosts, links, tuple(everything))
