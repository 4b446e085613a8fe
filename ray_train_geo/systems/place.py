"""Where a system is simulated: a named scenario, a topology, or equal devices on equal links."""

from __future__ import annotations

import math
from pathlib import Path

from ray_train_geo.cluster.topology import Topology
from ray_train_geo.cluster.topology_file import load_topology
from ray_train_geo.errors import SpecError
from ray_train_geo.systems.names import scenario_name
from ray_train_geo.systems.networks import single_pipeline_topology

__all__ = ["place"]

_BYTES_PER_S = 1e9 / 8  # of one Gbit/s


def place(
    scenario: str | None = None,
    topology: Topology | str | Path | None = None,
    devices: int | None = None,
    latency_ms: float | None = None,
    bandwidth_gbps: float | None = None,
) -> tuple[str | None, Topology | None]:
    """The one place that is given: a scenario's name, or a topology.

    Args:
        scenario: a name of ours or of the published measurements, such as ``case5``.
        topology: devices and links, or their file.
        devices, latency_ms, bandwidth_gbps: so many devices, and what is between any two of
            them: one-way milliseconds and Gbit/s.

    Raises:
        SpecError: none or more than one place is given, half of one, or an impossible figure.
    """
    network = {"devices": devices, "latency_ms": latency_ms, "bandwidth_gbps": bandwidth_gbps}
    given = [
        name
        for name, is_given in (
            ("a scenario", scenario is not None),
            ("a topology", topology is not None),
            ("/".join(network), any(x is not None for x in network.values())),
        )
        if is_given
    ]
    if not given:
        raise SpecError(
            f"nowhere to simulate: give a scenario, a topology, or {', '.join(network)}"
        )
    if len(given) > 1:
        raise SpecError(f"{' and '.join(given)}: each names the devices, so give one of them")
    if scenario is not None:
        return scenario_name(scenario), None
    if topology is not None:
        return None, topology if isinstance(topology, Topology) else load_topology(topology)
    if devices is None or latency_ms is None or bandwidth_gbps is None:
        missing = [name for name, x in network.items() if x is None]
        raise SpecError(f"{' and '.join(missing)} missing: give all of {', '.join(network)}")
    if devices < 1:
        raise SpecError(f"devices is {devices}: give a whole number from 1 on")
    if not 0 <= latency_ms < math.inf:
        raise SpecError(f"latency_ms is {latency_ms}: give milliseconds from 0 on")
    if not 0 < bandwidth_gbps < math.inf:
        raise SpecError(f"bandwidth_gbps is {bandwidth_gbps}: give Gbit/s above 0")
    return None, single_pipeline_topology(devices, latency_ms / 1e3, bandwidth_gbps * _BYTES_PER_S)
