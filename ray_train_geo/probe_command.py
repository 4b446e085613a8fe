"""``ray-train-geo probe``: measures the links of a live Ray cluster, for a topology file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ray_train_geo.console import AsJson, errors, print_json
from ray_train_geo.errors import ClusterError, SpecError
from ray_train_geo.outputs import require_writable

if TYPE_CHECKING:
    from ray_train_geo.actors.discovery import Node
    from ray_train_geo.cluster.probing import Place, Reading
    from ray_train_geo.cluster.topology import Topology

__all__ = ["probe"]

_MBIT = 1e6 / 8
_MOST_LINES = 60


def probe(
    address: Annotated[
        str | None,
        typer.Option(help="The Ray cluster, HOST:PORT or auto. Default: RAY_ADDRESS, or auto."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Write the topology here (YAML): for scaling.topology, and for plan."),
    ] = None,
    select: Annotated[
        list[str] | None,
        typer.Option("--label", metavar="KEY=VALUE", help="Only nodes so labelled; repeatable."),
    ] = None,
    flows: Annotated[
        int,
        typer.Option(min=1, max=64, help="TCP connections at once, to tell a path from a window."),
    ] = 8,
    seconds: Annotated[
        float,
        typer.Option(min=0.05, max=60, help="Of sending, each time; longer over long round trips."),
    ] = 0.5,
    rounds: Annotated[
        int,
        typer.Option(
            min=1,
            help="Where more rounds would be needed, some nodes stand for their regions.",
        ),
    ] = 256,
    as_json: AsJson = False,
) -> None:
    """Measure latency and bandwidth between all nodes of a live Ray cluster, in each direction.

    No two measurements that go on at the same time share a machine or a way between two regions.
    """
    with errors(as_json):
        if out is not None:
            require_writable("--out", out, (".yaml", ".yml"))
        labels = _labels(select or [])
        # Ray takes a second to import.
        from ray_train_geo.actors.discovery import live_nodes, matches
        from ray_train_geo.actors.probing import probe_nodes
        from ray_train_geo.cluster.topology_file import dump_topology
        from ray_train_geo.connection import joined

        console = Console(stderr=as_json)
        with joined(address or os.environ.get("RAY_ADDRESS") or "auto"):
            nodes = [n for n in live_nodes() if matches(n.labels, labels)]
            if len(nodes) < 2:
                raise ClusterError(
                    f"a probe needs two nodes, and {_count(len(nodes))} here"
                    + (f" with the labels {labels}" if labels else "")
                    + "; join more with `ray start --address=HOST:PORT` on each"
                )
            with console.status(f"{len(nodes)} nodes: starting agents") as status:
                places, readings = probe_nodes(
                    nodes, flows, seconds, rounds,
                    lambda done, of: status.update(f"{len(nodes)} nodes: round {done} of {of}"),
                )  # fmt: skip
        topology = _topology(nodes, places, readings)
        if out is not None:
            dump_topology(topology, out)
        if as_json:
            print_json(_as_json(nodes, readings, topology, out))
        else:
            _print(console, nodes, readings, out)


def _labels(texts: list[str]) -> dict[str, str]:
    found = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise SpecError(f"--label {text}: write KEY=VALUE, such as ray.io/region=ohio")
        found[key] = value
    return found


def _count(nodes: int) -> str:
    return "there is one" if nodes == 1 else "there is none"


def _topology(
    nodes: list[Node], places: list[Place], readings: Mapping[tuple[str, str], Reading]
) -> Topology:
    """Devices as Ray has them free, node links as measured, and region links as their medians."""
    from ray_train_geo.actors.discovery import devices_on
    from ray_train_geo.cluster.probing import links_of, region_links
    from ray_train_geo.cluster.topology import Topology
    from ray_train_geo.spec_sections import ScalingSpec

    links = links_of(readings)
    devices = []
    for node in nodes:
        whole = "GPU" if node.total.get("GPU", 0.0) >= 1 else "CPU"
        devices += devices_on(node, ScalingSpec(resources_per_worker={whole: 1.0}), None)
    return Topology(tuple(devices), node_links=links, region_links=region_links(places, links))


def _as_json(
    nodes: list[Node],
    readings: Mapping[tuple[str, str], Reading],
    topology: Topology,
    out: Path | None,
) -> dict[str, Any]:
    return {
        "nodes": [{"id": n.id, "host": n.hostname, "region": n.region} for n in nodes],
        "links": [
            {
                "from": source,
                "to": target,
                "latency_s": r.round_trip_s / 2,
                "flow_bytes_per_s": r.flow_bytes_per_s,
                "path_bytes_per_s": r.path_bytes_per_s,
                "cold_s": r.cold_s,
                "cold_bytes": r.cold_bytes,
            }
            for (source, target), r in readings.items()
        ],
        "devices": len(topology.devices),
        "topology": str(out) if out is not None else None,
    }


def _print(
    console: Console,
    nodes: list[Node],
    readings: Mapping[tuple[str, str], Reading],
    out: Path | None,
) -> None:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for title in ("from", "to"):
        table.add_column(title)
    for title in ("round trip ms", "one flow Mbit/s", "several", "first MB, cold ms"):
        table.add_column(title, justify="right")
    names = {n.id: f"{n.region} {n.hostname} {n.id[:6]}" for n in nodes}
    for (source, target), r in sorted(readings.items())[:_MOST_LINES]:
        table.add_row(
            names[source],
            names[target],
            f"{1e3 * r.round_trip_s:.2f}",
            f"{r.flow_bytes_per_s / _MBIT:,.0f}",
            f"{r.path_bytes_per_s / _MBIT:,.0f}",
            f"{1e3 * r.cold_s:,.1f}",
        )
    console.print(table)
    if len(readings) > _MOST_LINES:
        console.print(f"{len(readings) - _MOST_LINES} more: --json and --out have all of them")
    if out is not None:
        console.print(
            f"topology: {out}; plan with it: ray-train-geo plan JOB.yaml --topology {out}",
            soft_wrap=True,
            highlight=False,
        )
