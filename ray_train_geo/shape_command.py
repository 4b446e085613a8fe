"""``ray-train-geo shape``: scripts that give the links of a scenario to real hosts."""

from __future__ import annotations

from collections import defaultdict, deque
from ipaddress import IPv4Address
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from ray_train_geo.cluster.scenarios import scenario as named_scenario
from ray_train_geo.cluster.topology import Device, Topology
from ray_train_geo.cluster.topology_file import load_topology
from ray_train_geo.console import errors
from ray_train_geo.errors import SpecError, StorageError
from ray_train_geo.lab.emulate import some_nodes
from ray_train_geo.lab.tc_script import RealHost, tc_scripts

__all__ = ["shape"]


class _HostEntry(BaseModel):
    """One host of the hosts file."""

    model_config = ConfigDict(extra="forbid")

    node: str | None = None
    region: str | None = None
    address: IPv4Address
    interface: str = Field(pattern=r"^[A-Za-z0-9_.@-]{1,15}$")

    @model_validator(mode="after")
    def _one_place(self) -> _HostEntry:
        if (self.node is None) == (self.region is None):
            raise ValueError("give one of node and region: what it plays")
        return self


_Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
_HOSTS: TypeAdapter[dict[str, _HostEntry]] = TypeAdapter(dict[_Name, _HostEntry])


def shape(
    hosts: Annotated[
        Path,
        typer.Option(
            metavar="FILE",
            help="YAML, a line a host: `gpu-1: {region: Tokyo, address: 10.0.0.5, interface: "
            "eth0}`; in place of a region a node.",
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where HOST.sh is written for each.")],
    scenario: Annotated[
        str | None, typer.Option(help="A named cluster, such as worldwide or regional.")
    ] = None,
    topology: Annotated[
        Path | None, typer.Option(metavar="FILE", help="In its place: a topology file.")
    ] = None,
    scale: Annotated[
        float, typer.Option(help="What bandwidths are multiplied by; latencies stay.")
    ] = 1.0,
) -> None:
    """Write scripts that slow a real cluster's links down to those of a scenario, with Linux's tc.

    On each host: `sudo bash HOST.sh up`, afterwards `sudo bash HOST.sh clear`.
    """
    with errors():
        if (scenario is None) == (topology is None):
            raise SpecError("give one of --scenario and --topology: it says what the links are")
        found = named_scenario(scenario) if scenario is not None else load_topology(str(topology))
        source = f"the scenario {scenario}" if topology is None else f"the topology {topology}"
        nodes = some_nodes(found, None, scale)
        scripts = tc_scripts(nodes, _real_hosts(hosts, nodes), source)
        try:
            out.mkdir(parents=True, exist_ok=True)
            for name, text in scripts.items():
                (out / f"{name}.sh").write_text(text)
        except OSError as e:
            raise StorageError(f"--out {out}: can't be written: {e.strerror or e}") from None
        print(f"{len(scripts)} scripts in {out}: on each host, sudo bash {out}/HOST.sh up")


def _real_hosts(path: Path, topology: Topology) -> list[RealHost]:
    """The hosts, each with the node that it plays.

    Raises:
        SpecError: the file can't be read or is no list of hosts; a node is not there or played
            twice; a region has too few nodes.
    """
    entries = _read(path)
    by_node = {d.node: d for d in topology.devices}
    named = [e.node for e in entries.values() if e.node is not None]
    free: dict[str, deque[Device]] = defaultdict(deque)
    for device in topology.devices:
        if device.node not in named:
            free[device.region].append(device)
    regions = {d.region for d in topology.devices}
    found: list[RealHost] = []
    for name, entry in entries.items():
        if entry.node is not None:
            if entry.node not in by_node:
                raise SpecError(f"{path}: {name}: no node {entry.node!r} in the topology")
            if named.count(entry.node) > 1:
                raise SpecError(f"{path}: {name}: another host plays node {entry.node}, too")
            device = by_node[entry.node]
        else:
            if entry.region not in regions:
                known = ", ".join(sorted(regions))
                raise SpecError(
                    f"{path}: {name}: no region {entry.region!r} in the topology; it has {known}"
                )
            if not free[entry.region]:
                raise SpecError(f"{path}: {name}: region {entry.region} has no more nodes")
            device = free[entry.region].popleft()
        found.append(RealHost(name, device, str(entry.address), entry.interface))
    addresses = [h.address for h in found]
    for host in found:
        if addresses.count(host.address) > 1:
            raise SpecError(f"{path}: {host.name}: another host has address {host.address}, too")
    return found


def _read(path: Path) -> dict[str, _HostEntry]:
    try:
        raw: Any = yaml.safe_load(path.read_text())
    except OSError as e:
        raise SpecError(f"can't read the hosts {path}: {e.strerror or e}") from None
    except (yaml.YAMLError, ValueError) as e:
        raise SpecError(f"{path} is not valid YAML: {e}") from None
    if not isinstance(raw, dict) or len(raw) < 2:
        raise SpecError(f"{path}: hosts are a mapping of at least two names to what they are")
    try:
        return _HOSTS.validate_python(raw)
    except ValidationError as e:
        lines = [
            f"{'.'.join(map(str, x['loc']))}: {x['msg'].removeprefix('Value error, ')}"
            for x in e.errors()
        ]
        raise SpecError(f"{path}: " + "\n".join(lines)) from None
