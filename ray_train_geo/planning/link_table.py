"""All links of a topology as arrays, for costs of many pairs of devices at once.

Devices whose links are the same share a *site*: a node with links of its own is one, the other
nodes of a region are one together.  So ten thousand devices in sixteen regions need 16 x 16
numbers, and sixty-four noisy single-device nodes 64 x 64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ray_train_geo.cluster.topology import LOCAL_LINK, Device, Link, Topology

__all__ = ["LinkTable"]

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class LinkTable:
    """Links between devices, which are numbered in the topology's order.

    Rates are in seconds per byte, so that "no such link" is infinity and "no limit" is 0.

    Args:
        devices: the topology's.
        index: from device id to number.
        node, region, site: ``[devices]``; numbers of each device's node, region and site.
        latency_s, seconds_per_byte: ``[sites, sites]``; between different nodes.
        local_latency_s, local_seconds_per_byte: ``[nodes]``; between devices of one node.
        out_seconds_per_byte, in_seconds_per_byte: ``[nodes]``; what a node's flows share.  A NIC
            that nobody measured is as fast as the fastest of its links.
        uplink_seconds_per_byte: ``[regions, regions]``; what flows between regions share.
    """

    devices: tuple[Device, ...]
    index: Mapping[str, int]
    nodes: tuple[str, ...]
    regions: tuple[str, ...]
    node: Ints
    region: Ints
    site: Ints
    latency_s: Floats
    seconds_per_byte: Floats
    local_latency_s: Floats
    local_seconds_per_byte: Floats
    out_seconds_per_byte: Floats
    in_seconds_per_byte: Floats
    uplink_seconds_per_byte: Floats

    @classmethod
    def of(cls, topology: Topology) -> LinkTable:
        devices = topology.devices
        nodes = tuple(dict.fromkeys(d.node for d in devices))
        regions = tuple(dict.fromkeys(d.region for d in devices))
        node_number = {n: i for i, n in enumerate(nodes)}
        region_number = {r: i for i, r in enumerate(regions)}
        first_of = {d.node: d for d in reversed(devices)}

        own = {n for a, b in topology.node_links if a != b for n in (a, b)} & set(nodes)
        site_of_node: dict[str, int] = {}
        representatives: list[list[Device]] = []  # up to two nodes of each site
        shared: dict[str, int] = {}
        for name in nodes:
            device = first_of[name]
            if name in own or device.region not in shared:
                site_of_node[name] = len(representatives)
                if name not in own:
                    shared[device.region] = len(representatives)
                representatives.append([device])
            else:
                site_of_node[name] = shared[device.region]
                representatives[site_of_node[name]].append(device)

        sites = len(representatives)
        latency = np.zeros((sites, sites))
        per_byte = np.zeros((sites, sites))
        for i, a in enumerate(representatives):
            for j, b in enumerate(representatives):
                if i == j and len(a) == 1:
                    continue  # one node: its devices are joined by its local link
                latency[i, j], per_byte[i, j] = _rates(topology, a[0], b[1] if i == j else b[0])

        local = [topology.node_links.get((n, n), LOCAL_LINK) for n in nodes]
        site = np.array([site_of_node[d.node] for d in devices])
        out, into = _nics(topology, nodes, np.array([site_of_node[n] for n in nodes]), per_byte)
        uplinks = np.zeros((len(regions), len(regions)))
        for (source, target), rate in topology.region_uplinks.items():
            if source in region_number and target in region_number:
                uplinks[region_number[source], region_number[target]] = 1 / rate
        return cls(
            devices=devices,
            index={d.id: i for i, d in enumerate(devices)},
            nodes=nodes,
            regions=regions,
            node=np.array([node_number[d.node] for d in devices]),
            region=np.array([region_number[d.region] for d in devices]),
            site=site,
            latency_s=latency,
            seconds_per_byte=per_byte,
            local_latency_s=np.array([link.latency_s for link in local], dtype=float),
            local_seconds_per_byte=np.array([1 / link.flow_bytes_per_s for link in local]),
            out_seconds_per_byte=out,
            in_seconds_per_byte=into,
            uplink_seconds_per_byte=uplinks,
        )

    def hop(self, source: int, target: int) -> tuple[float, float]:
        """``(latency_s, seconds_per_byte)`` of a flow between two devices."""
        node = self.node[source]
        if node == self.node[target]:
            return float(self.local_latency_s[node]), float(self.local_seconds_per_byte[node])
        a, b = self.site[source], self.site[target]
        return float(self.latency_s[a, b]), float(self.seconds_per_byte[a, b])

    def hops(self, source: Ints, target: Ints) -> tuple[Floats, Floats]:
        """As :meth:`hop`, of arrays of devices that broadcast together."""
        nodes = self.node[source]
        same = nodes == self.node[target]
        a, b = self.site[source], self.site[target]
        return (
            np.where(same, self.local_latency_s[nodes], self.latency_s[a, b]),
            np.where(same, self.local_seconds_per_byte[nodes], self.seconds_per_byte[a, b]),
        )


def _rates(topology: Topology, a: Device, b: Device) -> tuple[float, float]:
    try:
        link: Link = topology.link(a, b)
    except KeyError:
        return math.inf, math.inf
    return link.latency_s, 1 / link.flow_bytes_per_s


def _nics(
    topology: Topology, nodes: Sequence[str], site: Ints, per_byte: Floats
) -> tuple[Floats, Floats]:
    """Seconds per byte out of and into each node."""
    alone = np.bincount(site, minlength=len(per_byte)) == 1
    links = per_byte.copy()
    links[np.diag_indices(len(links))] = np.where(alone, math.inf, np.diag(per_byte))
    fastest_out = links.min(axis=1, initial=math.inf)
    fastest_in = links.min(axis=0, initial=math.inf)
    out = np.where(np.isinf(fastest_out[site]), 0.0, fastest_out[site])
    into = np.where(np.isinf(fastest_in[site]), 0.0, fastest_in[site])
    for i, name in enumerate(nodes):
        nic = topology.node_uplinks.get(name)
        if nic is not None:
            out[i], into[i] = 1 / nic.out_bytes_per_s, 1 / nic.in_bytes_per_s
    return out, into
