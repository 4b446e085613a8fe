"""The published clusters as they behaved in the measured runs, not as they were configured.

A planner knows a cluster's nominal figures (``cluster.scenarios``).  The measured runs had links
shaped with ``tc`` that carried a little more, 10 ms inside a region where 5 were configured, NICs
that eight processes could not fill, single flows that the cloud limits, and two probes that can't
be right.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import replace

from ray_train_geo.cluster.gpus import gpu
from ray_train_geo.cluster.scenarios import scenario
from ray_train_geo.cluster.topology import Device, Link, Topology, Uplink
from ray_train_geo.errors import SpecError
from ray_train_geo.systems.constants import Constants, Hardware, constants

__all__ = ["as_run", "instances", "peak_flops_per_s", "single_pipeline_topology", "sustained"]

_GBPS = 1e9 / 8
_INSIDE_INSTANCE = Link(0.0, 100 * _GBPS)
"""As DT-FM configures it."""
_SHAPED = ("universities", "regional", "worldwide")
_INSIDE_REGION_S = {"regional": 0.010, "worldwide": 0.010}
"""One way, in the measured runs (the configuration says 5 ms)."""
_INCREDIBLE = 5.0
"""Times that one direction of a link is faster than the other, in a probe that is not believed."""


def as_run(name: str, constants: Constants, *, collectives: bool = False) -> Topology:
    """The scenario ``name`` as it behaved, with what its devices sustained.

    Scenarios of which nothing was measured are as they are.

    Args:
        collectives: as collectives saw it: they have several connections, which fill a NIC.

    Raises:
        SpecError: there is no such scenario.
    """
    found = scenario(name)
    hardware = constants.hardware
    if name in ("datacenter", "datacenter-spot"):
        if collectives:
            found = _filled_nics(found)
        else:
            found = _data_center(found, hardware, name == "datacenter")
    elif name in _SHAPED:
        found = _shaped(found, hardware, _INSIDE_REGION_S.get(name))
    elif name.startswith("fluidstack"):
        found = _credible(found)
    return found.with_devices(sustained(d, hardware) for d in found.devices)


def single_pipeline_topology(
    devices: int,
    latency_s: float,
    bandwidth_bytes_per_s: float,
    figures: Constants | None = None,
) -> Topology:
    """So many V100s, one an instance, any two joined by a link shaped to these figures.

    Raises:
        SpecError: no device, or figures that no link has.
    """
    if devices < 1:
        raise SpecError(f"devices is a whole number of at least 1, not {devices}")
    if not 0 <= latency_s < math.inf:
        raise SpecError(f"a latency is 0 or more and finite, not {latency_s} s")
    if not 0 < bandwidth_bytes_per_s < math.inf:
        raise SpecError(f"a bandwidth is above 0 and finite, not {bandwidth_bytes_per_s} B/s")
    hardware = (constants() if figures is None else figures).hardware
    region = "cluster"
    found = tuple(
        gpu("V100-16G").device(f"v100-{i}/0", node=f"v100-{i}", region=region)
        for i in range(devices)
    )
    link = Link(latency_s, bandwidth_bytes_per_s * hardware.shaped_rate_factor)
    # As much as all of a device's links together: it never limits.
    no_limit = Uplink(*[devices * link.bandwidth_bytes_per_s] * 2)
    return Topology(
        found,
        region_links={(region, region): link},
        node_uplinks={d.node: no_limit for d in found},
    )


def instances(gpus: int, gpus_per_node: int, nic_bytes_per_s: float) -> Topology:
    """V100s in instances of several, which share a NIC."""
    region = "cluster"
    found = tuple(
        gpu("V100-16G").device(
            f"v100-{i // gpus_per_node}/{i % gpus_per_node}",
            node=f"v100-{i // gpus_per_node}",
            region=region,
        )
        for i in range(gpus)
    )
    return Topology(
        found,
        region_links={(region, region): Link(0.0, nic_bytes_per_s)},
        node_links={(d.node, d.node): _INSIDE_INSTANCE for d in found},
        node_uplinks={d.node: Uplink(nic_bytes_per_s, nic_bytes_per_s) for d in found},
    )


def sustained(device: Device, hardware: Hardware) -> Device:
    """With the rates that the measured runs reached, if its type took part in them."""
    rates = {
        "V100-16G": {
            "fp16": hardware.v100_fp16_tflops * 1e12,
            "fp32": hardware.v100_fp32_tflops * 1e12,
        },
        "A40": {"fp16": hardware.a40_fp16_tflops * 1e12},
    }.get(device.type)
    if rates is None:
        return device
    known = {**dict(device.flops_by_precision), **rates}
    return dataclasses.replace(
        device, flops_per_s=rates["fp16"], flops_by_precision=tuple(sorted(known.items()))
    )


def peak_flops_per_s(topology: Topology, precision: str) -> float:
    """What the data sheets say of all devices together; 0 for devices of no known type."""
    known = {}
    for device in topology.devices:
        if device.type not in known:
            peaks: dict[str, float] = dict(gpu(device.type).peak_flops_per_s)
            known[device.type] = peaks.get(precision, 0.0)
    return sum(known[device.type] for device in topology.devices)


def _data_center(found: Topology, hardware: Hardware, crowded: bool) -> Topology:
    """Flows as fast as the cloud lets one be, and NICs as far as their processes fill them."""
    share = hardware.eight_process_nic_share if crowded else 1.0
    flow = hardware.flow_gbps * _GBPS
    return replace(
        found,
        region_links={
            pair: replace(link, bandwidth_bytes_per_s=flow)
            for pair, link in found.region_links.items()
        },
        node_uplinks={
            node: Uplink(nic.out_bytes_per_s * share, nic.in_bytes_per_s * share)
            for node, nic in found.node_uplinks.items()
        },
    )


def _filled_nics(found: Topology) -> Topology:
    """Nothing but the NICs limits."""
    fastest = max(nic.out_bytes_per_s for nic in found.node_uplinks.values())
    return replace(
        found,
        region_links={
            pair: replace(link, bandwidth_bytes_per_s=fastest)
            for pair, link in found.region_links.items()
        },
    )


def _credible(found: Topology) -> Topology:
    """Without probes that are far below those of the other direction.

    Of FluidStack's eight directed probes between regions six are 16.6 MB per round trip, within
    7 %; the two into the west are a tenth of that.
    """

    def rate(pair: tuple[str, str], rates: Mapping[tuple[str, str], float]) -> float:
        back = rates[pair[1], pair[0]]
        return back if back > _INCREDIBLE * rates[pair] else rates[pair]

    flows = {pair: link.bandwidth_bytes_per_s for pair, link in found.region_links.items()}
    return replace(
        found,
        region_links={
            pair: replace(link, bandwidth_bytes_per_s=rate(pair, flows))
            for pair, link in found.region_links.items()
        },
        region_uplinks={pair: rate(pair, found.region_uplinks) for pair in found.region_uplinks},
    )


def _shaped(found: Topology, hardware: Hardware, inside_s: float | None) -> Topology:
    def link(pair: tuple[str, str], nominal: Link) -> Link:
        inside = pair[0] == pair[1] and inside_s is not None
        return Link(
            inside_s if inside and inside_s is not None else nominal.latency_s,
            nominal.bandwidth_bytes_per_s * hardware.shaped_rate_factor,
        )

    return replace(
        found, region_links={pair: link(pair, old) for pair, old in found.region_links.items()}
    )
