"""Named topologies: the clusters of published runs, and two kinds of made-up ones.

Published by DT-FM (Yuan et al., NeurIPS 2022; its scheduler and experiment notes): the five cases
of 64 V100s and the two FluidStack runs, with their delays and bandwidths.  Assumed:

- NICs are shared by all of a node's flows: 25 Gbit/s in ``datacenter``, 10 in the other V100 cases;
  on FluidStack as fast as a link inside the region.
- A flow between regions of the V100 cases has 16.6 MB in flight at most: what explains their
  measured times.  FluidStack's bandwidths were measured on flows, so they have no such limit.
- All flows between two FluidStack regions share the bandwidth that was measured.
- Two GPUs of a FluidStack node, and those of ``mixed``, have a link as in DT-FM's instances.
- What the devices sustain and cost: the catalog's figures (``cluster.gpus``).

``mixed`` is three regions with unequal GPUs, AWS instances and DT-FM's links between the regions;
``random-SEED`` is :func:`ray_train_geo.cluster.random_topology.random_topology`.
"""

from __future__ import annotations

import csv
import difflib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from importlib import resources
from itertools import permutations

from ray_train_geo.cluster.gpus import gpu
from ray_train_geo.cluster.random_topology import random_topology
from ray_train_geo.cluster.topology import (
    DEFAULT_LINK,
    Device,
    Link,
    MarketType,
    Topology,
    Uplink,
)
from ray_train_geo.errors import SpecError

__all__ = ["SCENARIOS", "scenario"]

SCENARIOS = (
    "datacenter",
    "datacenter-spot",
    "universities",
    "regional",
    "worldwide",
    "fluidstack-2",
    "fluidstack-3",
    "mixed",
)
"""The names; besides them there is ``random-SEED`` for any integer SEED."""

Links = dict[tuple[str, str], Link]

_GBPS = 1e9 / 8  # bytes per second
_WAN_WINDOW_BYTES = 16.6e6
_REGIONAL = ("Virginia", "Oregon", "California", "Ohio")
_WORLDWIDE = ("Oregon", "Virginia", "Ohio", "Tokyo", "Seoul", "London", "Frankfurt", "Ireland")


def scenario(name: str) -> Topology:
    """The topology called ``name``.

    Raises:
        SpecError: there is none.
    """
    seed = re.fullmatch(r"random-(-?\d+)", name)
    if seed:
        return random_topology(int(seed[1]))
    match name:
        case "datacenter":
            return _datacenter()
        case "datacenter-spot":
            return _datacenter_spot()
        case "universities":
            return _v100s({"Ohio": 32, "Virginia": 32}, inside=_link(1, 5))
        case "regional":
            return _regional()
        case "worldwide":
            return _v100s(dict.fromkeys(_WORLDWIDE, 8), inside=_link(5, 2))
        case "fluidstack-2":
            return _fluidstack(name, ("east", "mid"))
        case "fluidstack-3":
            return _fluidstack(name, ("east", "mid", "west"))
        case "mixed":
            return _mixed()
    known = (*SCENARIOS, "random-SEED")
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    raise SpecError(
        f"no scenario {name!r}: {hint}there are {', '.join(known)} (SEED is any integer)"
    )


def _datacenter() -> Topology:
    """8 instances of 8 GPUs; a GPU gets an eighth of its instance's NIC."""
    region = "Virginia"
    devices = _devices(region, "V100-16G", nodes=8, gpus=8, prefix="p3-16xlarge")
    return _topology(devices, {(region, region): _link(0, 25 / 8)}, {region: 25})


def _datacenter_spot() -> Topology:
    """8 instances of 4 GPUs and 32 of one."""
    region = "Virginia"
    large = _devices(region, "V100-16G", nodes=8, gpus=4, market_type="spot", prefix="p3-8xlarge")
    small = _devices(region, "V100-16G", nodes=32, gpus=1, market_type="spot", prefix="p3-2xlarge")
    return _topology(large + small, {(region, region): _link(0, 1.25)}, {region: 10})


def _v100s(nodes: Mapping[str, int], inside: Link) -> Topology:
    """Regions of single-GPU nodes."""
    devices = [
        device
        for region, count in nodes.items()
        for device in _devices(region, "V100-16G", nodes=count, gpus=1, market_type="spot")
    ]
    links = {(r, r): inside for r in nodes} | _wan(list(nodes))
    return _topology(devices, links, dict.fromkeys(nodes, 10))


def _regional() -> Topology:
    """Four regions of 16; between two of them DT-FM's configuration has more than its table."""
    found = _v100s(dict.fromkeys(_REGIONAL, 16), inside=_link(5, 2))
    link = replace(_link(67, 1.15), window_bytes=_WAN_WINDOW_BYTES)
    both = {("Oregon", "Virginia"): link, ("Virginia", "Oregon"): link}
    return replace(found, region_links={**found.region_links, **both})


def _fluidstack(name: str, regions: Sequence[str]) -> Topology:
    """8 nodes of two A40s in each region; what was measured between regions is shared."""
    devices = [d for region in regions for d in _devices(region, "A40", nodes=8, gpus=2)]
    links: Links = {}
    nics: dict[str, float] = {}
    uplinks: dict[tuple[str, str], float] = {}
    for row in _rows("fluidstack_links.csv"):
        if row["scenario"] != name:
            continue
        pair = row["region_from"], row["region_to"]
        bandwidth_gbps = float(row["bandwidth_gbps"])
        links[pair] = _link(float(row["delay_ms"]), bandwidth_gbps)
        if pair[0] == pair[1]:
            nics[pair[0]] = bandwidth_gbps
        else:
            uplinks[pair] = links[pair].bandwidth_bytes_per_s
    return _topology(devices, links, nics, uplinks)


def _mixed() -> Topology:
    """32 A100s (p4d.24xlarge), 64 V100s (p3.16xlarge) and 32 T4s (g4dn.12xlarge)."""
    devices = [
        *_devices("Virginia", "A100-40G", nodes=4, gpus=8, market_type="spot"),
        *_devices("Oregon", "V100-16G", nodes=8, gpus=8, market_type="spot"),
        *_devices("Ireland", "T4", nodes=8, gpus=4, market_type="spot"),
    ]
    nics = {"Virginia": 400, "Oregon": 25, "Ireland": 50}
    links = {(r, r): DEFAULT_LINK for r in nics} | _wan(list(nics))
    return _topology(devices, links, nics)


def _link(latency_ms: float, bandwidth_gbps: float) -> Link:
    return Link(latency_ms / 1e3, bandwidth_gbps * _GBPS)


def _devices(
    region: str,
    type_name: str,
    nodes: int,
    gpus: int,
    market_type: MarketType = "on-demand",
    prefix: str = "",
) -> list[Device]:
    """Devices ``region-0/0``, ``region-0/1``, ...; ``prefix`` may stand for the region."""
    kind = gpu(type_name)
    names = [f"{prefix or region.lower()}-{n}" for n in range(nodes)]
    return [
        kind.device(f"{node}/{i}", node, region, market_type=market_type)
        for node in names
        for i in range(gpus)
    ]


def _topology(
    devices: Sequence[Device],
    region_links: Links,
    nics_gbps: Mapping[str, float],
    region_uplinks: Mapping[tuple[str, str], float] | None = None,
) -> Topology:
    """With a NIC for every node of a region, and DT-FM's link between the GPUs of a node."""
    region_of = {d.node: d.region for d in devices}
    gpus = Counter(d.node for d in devices)
    nics = {r: Uplink(gbps * _GBPS, gbps * _GBPS) for r, gbps in nics_gbps.items()}
    return Topology(
        tuple(devices),
        node_links={(n, n): _link(0, 100) for n, count in gpus.items() if count > 1},
        region_links=region_links,
        node_uplinks={n: nics[r] for n, r in region_of.items()},
        region_uplinks=region_uplinks or {},
        default_link=None,
    )


def _wan(regions: Sequence[str]) -> Links:
    """DT-FM's links between all of ``regions``, both ways."""
    published: Links = {}
    for row in _rows("wan_links.csv"):
        a, b = row["region_a"], row["region_b"]
        link = Link(
            float(row["delay_ms"]) / 1e3, float(row["bandwidth_gbps"]) * _GBPS, _WAN_WINDOW_BYTES
        )
        published[a, b] = published[b, a] = link
    return {pair: published[pair] for pair in permutations(regions, 2)}


def _rows(name: str) -> Iterable[dict[str, str]]:
    """The rows of a table in ``data``; lines that begin with # say where it is from."""
    text = (resources.files("ray_train_geo.cluster") / "data" / name).read_text()
    return csv.DictReader(line for line in text.splitlines() if not line.startswith("#"))
