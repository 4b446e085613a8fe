"""Reading and writing a topology as YAML.

.. code-block:: yaml

    devices:                  # may be left out where devices come from Ray
      - {id: a/0, node: a, region: ohio, type: A100-80G, flops_per_s: 1.4e14, memory_bytes: 8.0e10}
    nodes:                    # equal nodes in one line, here b-0 to b-3 with devices b-0/0 to b-3/7
      - {node: b, region: virginia, type: V100-16G, gpus: 8, count: 4, market_type: spot}
    links:
      - {from: ohio, to: virginia, latency_ms: 11, bandwidth_gbps: 1.12, window_mb: 16.6}
      - {from: b-0, to: b-1, between: nodes, latency_ms: 9, bandwidth_gbps: 2}
      - {from: virginia, to: virginia, between: devices, latency_ms: 0, bandwidth_gbps: 100}
    uplinks:
      - {node: a, out_gbps: 10, in_gbps: 25}
      - {region: virginia, gbps: 25}             # each node of the region
      - {from: ohio, to: virginia, gbps: 4}      # all flows from one region to the other
    default_link: {latency_ms: 50, bandwidth_gbps: 0.5}

Latency is one way.  A link of a region to itself is between its nodes, one of a node to itself (or,
for each node of a region, ``between: devices``) between its devices; a link of nodes comes before
that of their regions.  What a device does not say is the catalog's for its type (``cluster.gpus``).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from ray_train_geo.cluster.topology import DEFAULT_LINK, Device, Link, Topology, Uplink
from ray_train_geo.cluster.topology_entries import (
    UPLINK_KINDS,
    LinkEntry,
    NodeUplinkEntry,
    RegionUplinkEntry,
    TopologyEntries,
)
from ray_train_geo.cluster.validate_topology import validate_network, validate_topology
from ray_train_geo.errors import SpecError

__all__ = ["dump_topology", "load_topology"]

# libyaml, where PyYAML was built with it: a file of ten thousand devices takes 1 s and not 10.
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_Dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)

Pair = tuple[str, str]
_Entry = TypeVar("_Entry", LinkEntry, RegionUplinkEntry)
_Value = TypeVar("_Value")
_ALL_NODES = "*"
_NO_NODES = "the file has no devices, so no nodes that this could mean; give the node"


def load_topology(path: str | Path) -> Topology:
    """Read a topology, and check it.

    A file that names devices must say how any two of its regions are linked, or give a
    ``default_link``; without devices, what no link names has ``topology.DEFAULT_LINK``.

    Raises:
        SpecError: the file can't be read, is no YAML, or is no topology; one line for each thing
            that is wrong, with where it stands.
    """
    path = Path(path)
    try:
        raw = yaml.load(path.read_text(), Loader=_Loader)
    except OSError as e:
        raise SpecError(f"can't read the topology {path}: {e.strerror or e}") from None
    except (yaml.YAMLError, ValueError) as e:
        raise SpecError(f"{path} is not valid YAML: {e}") from None
    if not isinstance(raw, dict):
        raise SpecError(f"{path}: a topology is a mapping with devices and links")
    try:
        entries = TopologyEntries.model_validate(raw)
    except ValidationError as e:
        lines = [
            f"{_place(x['loc'])}: {x['msg'].removeprefix('Value error, ')}" for x in e.errors()
        ]
        raise SpecError(f"{path}: " + "\n".join(lines)) from None
    wrong: list[str] = []
    topology = _topology(entries, wrong)
    if wrong:
        raise SpecError(f"{path}: " + "\n".join(wrong))
    try:
        (validate_topology if topology.devices else validate_network)(topology)
    except SpecError as e:
        raise SpecError(f"{path}: {e}") from None
    return topology


def _place(location: Sequence[str | int]) -> str:
    return ".".join(str(part) for part in location if part not in UPLINK_KINDS) or "file"


def _topology(entries: TopologyEntries, wrong: list[str]) -> Topology:
    """The topology; what no entry shows by itself to be wrong is added to ``wrong``."""
    devices = _devices(entries, wrong)
    region_of = {d.node: d.region for d in devices}
    regions = frozenset(region_of.values())
    links: dict[str, dict[str, LinkEntry]] = {"nodes": {}, "regions": {}, "devices": {}}
    for i, link in enumerate(entries.links):
        links[link.between][f"links.{i}"] = link
    of_nodes = _by_pair(links["nodes"], "nodes", region_of.keys(), wrong)
    of_regions = _by_pair(links["regions"], "regions", regions, wrong)
    inside = _by_pair(links["devices"], "regions", regions, wrong)
    if not devices:
        wrong += [f"{place}: {_NO_NODES}" for place in links["devices"]]

    nics: dict[str, NodeUplinkEntry] = {}
    shared: dict[str, RegionUplinkEntry] = {}
    for i, uplink in enumerate(entries.uplinks):
        if isinstance(uplink, NodeUplinkEntry):
            nics[f"uplinks.{i}"] = uplink
        else:
            shared[f"uplinks.{i}"] = uplink
    uplinks = _by_pair(shared, "regions", regions, wrong)

    default = DEFAULT_LINK if not devices else None
    if "default_link" in entries.model_fields_set:
        default = entries.default_link.link() if entries.default_link else None
    return Topology(
        tuple(devices),
        node_links={
            **{(n, n): inside[r, r].link() for n, r in region_of.items() if (r, r) in inside},
            **{pair: entry.link() for pair, entry in of_nodes.items()},
        },
        region_links={pair: entry.link() for pair, entry in of_regions.items()},
        node_uplinks=_node_uplinks(nics, region_of, wrong),
        region_uplinks={pair: entry.rate_bytes_per_s() for pair, entry in uplinks.items()},
        default_link=default,
    )


def _devices(entries: TopologyEntries, wrong: list[str]) -> list[Device]:
    devices: dict[str, Device] = {}
    region_of: dict[str, str] = {}
    listed = [
        *((f"devices.{i}", entry.devices()) for i, entry in enumerate(entries.devices)),
        *((f"nodes.{i}", entry.devices()) for i, entry in enumerate(entries.nodes)),
    ]
    for place, found in listed:
        for device in found:
            if device.id in devices:
                wrong.append(f"{place}.id: {device.id!r} is given twice; ids must be unique")
            region = region_of.setdefault(device.node, device.region)
            if region != device.region:
                wrong.append(f"{place}.region: node {device.node!r} is in {region!r} already")
            devices[device.id] = device
    return list(devices.values())


def _by_pair(
    placed: Mapping[str, _Entry], between: str, names: Collection[str], wrong: list[str]
) -> dict[Pair, _Entry]:
    """The entry of each direction, from entries by place.

    Args:
        names: of all nodes or regions; empty where devices come from Ray.
    """
    found: dict[Pair, _Entry] = {}
    for place, entry in placed.items():
        for name in sorted({entry.source, entry.target}):
            _check_name(place, name, between, names, wrong)
        for pair in entry.directions():
            if pair in found:
                wrong.append(
                    f"{place}: {pair[0]} -> {pair[1]} is given twice; for two unequal "
                    "directions write symmetric: false in both"
                )
            found[pair] = entry
    return found


def _check_name(
    place: str, name: str, between: str, names: Collection[str], wrong: list[str]
) -> None:
    if names and name not in names:
        wrong.append(
            f"{place}: no device is in {name!r}, so it names none of the {between} "
            f"({', '.join(sorted(names))})"
        )


def _node_uplinks(
    placed: Mapping[str, NodeUplinkEntry], region_of: Mapping[str, str], wrong: list[str]
) -> dict[str, Uplink]:
    """NICs by node: its own entry's, or its region's, or that of all nodes."""
    of_node: dict[str, Uplink] = {}
    of_region: dict[str, Uplink] = {}
    for place, entry in placed.items():
        if not region_of and entry.node in (None, _ALL_NODES):
            wrong.append(f"{place}: {_NO_NODES}")
        if entry.node is not None:
            name, group = entry.node, of_node
            if name != _ALL_NODES:
                _check_name(place, name, "nodes", region_of.keys(), wrong)
        else:
            name, group = entry.region or "", of_region
            _check_name(place, name, "regions", frozenset(region_of.values()), wrong)
        if name in group:
            wrong.append(f"{place}: {name!r} is given twice")
        group[name] = entry.uplink()
    everywhere = of_node.pop(_ALL_NODES, None)
    wide = {n: of_region.get(region, everywhere) for n, region in region_of.items()}
    return {n: nic for n, nic in wide.items() if nic is not None} | of_node


def dump_topology(topology: Topology, path: str | Path) -> None:
    """Write ``topology`` so that :func:`load_topology` reads the same, to the last bit.

    Raises:
        OSError: the file can't be written.
    """
    default = topology.default_link
    content = {
        "devices": [
            {**dataclasses.asdict(device), "flops_by_precision": dict(device.flops_by_precision)}
            for device in topology.devices
        ],
        "links": [
            *_pairs(topology.region_links, lambda link: {"between": "regions", **_figures(link)}),
            *_pairs(topology.node_links, lambda link: {"between": "nodes", **_figures(link)}),
        ],
        "uplinks": [
            *({"node": n, **dataclasses.asdict(nic)} for n, nic in topology.node_uplinks.items()),
            *_pairs(topology.region_uplinks, lambda rate: {"bytes_per_s": rate}),
        ],
        "default_link": None if default is None else _figures(default),
    }
    Path(path).write_text(yaml.dump(content, Dumper=_Dumper, sort_keys=False))


def _figures(link: Link) -> dict[str, float]:
    """What is the network's: how many flows are used is the job's."""
    figures = dataclasses.asdict(link)
    return {name: x for name, x in figures.items() if name != "flows" and not math.isinf(x)}


def _pairs(
    values: Mapping[Pair, _Value], fields: Callable[[_Value], dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """One entry for both directions where they are equal."""
    written: set[Pair] = set()
    for (source, target), value in values.items():
        if (source, target) in written:
            continue
        symmetric = values.get((target, source)) == value
        if symmetric:
            written.add((target, source))
        yield {"from": source, "to": target, **fields(value), "symmetric": symmetric}
