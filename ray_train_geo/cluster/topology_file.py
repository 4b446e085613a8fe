"""Reading and writing a topology as YAML.

.. code-block:: yaml

    devices:                  # may be left out where devices come from Ray
      - {id: a/0, node: a, region: ohio, type: A100-80G, flops_per_s: 1.4e14, memory_bytes: 8.0e10}
      - {id: b/0, node: b, region: virginia, market_type: spot}
    links:
      - {from: ohio, to: virginia, latency_ms: 11, bandwidth_gbps: 1.12}
      - {from: a, to: b, between: nodes, latency_ms: 9, bandwidth_gbps: 2, symmetric: false}

Latency is one way.  A link of a region to itself is between its nodes; a link between two nodes
comes before that of their regions.  What no link names has ``topology.DEFAULT_LINK``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from ray_train_geo.cluster.topology import Device, Link, Topology
from ray_train_geo.errors import SpecError

__all__ = ["dump_topology", "load_topology"]

_GBPS = 1e9 / 8  # bytes per second


def _whole(value: Any) -> Any:
    """YAML 1.1 reads 8e10 as a string; a number of bytes may be written so."""
    try:
        return int(float(value)) if isinstance(value, str) else value
    except (ValueError, OverflowError):
        return value


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class _DeviceEntry(_Entry):
    id: str = Field(min_length=1)
    node: str = Field(min_length=1)
    region: str = "local"
    zone: str = ""
    market_type: Literal["spot", "on-demand"] = "on-demand"
    type: str = "cpu"
    flops_per_s: float = Field(2e10, gt=0)
    memory_bytes: Annotated[int, BeforeValidator(_whole)] = Field(4 * 2**30, gt=0)


class _LinkEntry(_Entry):
    source: str = Field(alias="from", min_length=1)
    target: str = Field(alias="to", min_length=1)
    between: Literal["regions", "nodes"] = "regions"
    latency_ms: float = Field(ge=0)
    bandwidth_gbps: float = Field(gt=0)
    symmetric: bool = True


class _File(_Entry):
    devices: list[_DeviceEntry] = []
    links: list[_LinkEntry] = []


def load_topology(path: str | Path) -> Topology:
    """Read a topology.

    Raises:
        SpecError: the file can't be read, is no YAML, or is no topology; one line for each thing
            that is wrong, with where it stands.
    """
    path = Path(path)
    try:
        raw = yaml.safe_load(path.read_text())
    except OSError as e:
        raise SpecError(f"can't read the topology {path}: {e.strerror or e}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise SpecError(f"{path} is not valid YAML: {e}") from None
    if not isinstance(raw, dict):
        raise SpecError(f"{path}: a topology is a mapping with devices and links")
    try:
        file = _File.model_validate(raw)
    except ValidationError as e:
        lines = [f"{'.'.join(map(str, x['loc']))}: {x['msg']}" for x in e.errors()]
        raise SpecError(f"{path}: " + "\n".join(lines)) from None
    wrong = _inconsistencies(file)
    if wrong:
        raise SpecError(f"{path}: " + "\n".join(wrong))

    links: dict[str, dict[tuple[str, str], Link]] = {"nodes": {}, "regions": {}}
    for entry in file.links:
        for pair in _directions(entry):
            links[entry.between][pair] = Link(entry.latency_ms / 1e3, entry.bandwidth_gbps * _GBPS)
    devices = tuple(Device(**entry.model_dump()) for entry in file.devices)
    return Topology(devices, node_links=links["nodes"], region_links=links["regions"])


def dump_topology(topology: Topology, path: str | Path) -> None:
    """Write ``topology`` so that :func:`load_topology` reads it back (links up to rounding).

    Raises:
        OSError: the file can't be written.
    """
    content = {
        "devices": [dataclasses.asdict(device) for device in topology.devices],
        "links": [
            *_link_entries("regions", topology.region_links),
            *_link_entries("nodes", topology.node_links),
        ],
    }
    Path(path).write_text(yaml.safe_dump(content, sort_keys=False))


def _directions(entry: _LinkEntry) -> set[tuple[str, str]]:
    there = entry.source, entry.target
    return {there, there[::-1]} if entry.symmetric else {there}


def _inconsistencies(file: _File) -> list[str]:
    """What pydantic can't see: names given twice, or of nothing."""
    wrong: list[str] = []
    ids: set[str] = set()
    regions: dict[str, str] = {}
    for i, device in enumerate(file.devices):
        if device.id in ids:
            wrong.append(f"devices.{i}.id: {device.id!r} is given twice; ids must be unique")
        ids.add(device.id)
        region = regions.setdefault(device.node, device.region)
        if region != device.region:
            wrong.append(f"devices.{i}.region: node {device.node!r} is in {region!r} already")
    known = {"nodes": set(regions), "regions": set(regions.values())}
    given: set[tuple[str, tuple[str, str]]] = set()
    for i, entry in enumerate(file.links):
        names = known[entry.between]
        if file.devices:
            wrong += [
                f"links.{i}: no device is in {name!r}, so it names none of the {entry.between} "
                f"({', '.join(sorted(names))})"
                for name in sorted({entry.source, entry.target} - names)
            ]
        if entry.between == "nodes" and entry.source == entry.target:
            wrong.append(f"links.{i}: a node has no link to itself ({entry.source!r}); remove it")
        for pair in sorted(_directions(entry)):
            if (entry.between, pair) in given:
                wrong.append(
                    f"links.{i}: {pair[0]} -> {pair[1]} is given twice; for two unequal "
                    "directions write symmetric: false in both"
                )
            given.add((entry.between, pair))
    return wrong


def _link_entries(between: str, links: Mapping[tuple[str, str], Link]) -> list[dict[str, Any]]:
    """One entry for both directions where they are equal."""
    entries: list[dict[str, Any]] = []
    written: set[tuple[str, str]] = set()
    for (source, target), link in links.items():
        if (source, target) in written:
            continue
        symmetric = links.get((target, source)) == link
        if symmetric:
            written.add((target, source))
        entries.append(
            {
                "from": source,
                "to": target,
                "between": between,
                "latency_ms": link.latency_s * 1e3,
                "bandwidth_gbps": link.bandwidth_bytes_per_s / _GBPS,
                "symmetric": symmetric,
            }
        )
    return entries
