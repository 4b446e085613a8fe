"""What there is to train on: devices, and the directed links between them (level 0).

A topology is a value: the planner gets one and never asks a cluster anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

__all__ = ["DEFAULT_LINK", "LOCAL_LINK", "Device", "Link", "Topology"]

MarketType = Literal["spot", "on-demand"]


@dataclass(frozen=True, slots=True)
class Device:
    """One GPU (or one CPU worker) that can hold a stage.

    Args:
        id: unique name, such as ``node-id/0``.
        type: hardware type, such as ``A100-80G`` or ``cpu``.
        flops_per_s: sustained FLOP/s on this job's layers, not the data sheet's peak.
        memory_bytes: memory that a stage may fill.
    """

    id: str
    node: str
    region: str = "local"
    zone: str = ""
    market_type: MarketType = "on-demand"
    type: str = "cpu"
    flops_per_s: float = 2e10
    memory_bytes: int = 4 * 2**30


@dataclass(frozen=True, slots=True)
class Link:
    """A directed link: one-way latency and the bandwidth of one flow."""

    latency_s: float
    bandwidth_bytes_per_s: float

    def transfer_s(self, size_bytes: float) -> float:
        """Time from the start of a send to the arrival of its last byte, in seconds."""
        return self.latency_s + size_bytes / self.bandwidth_bytes_per_s


LOCAL_LINK = Link(latency_s=5e-5, bandwidth_bytes_per_s=2.5e9)
"""Between two workers on one node (gloo over loopback, measured 2.5-3.4 GB/s)."""

DEFAULT_LINK = Link(latency_s=2.5e-4, bandwidth_bytes_per_s=1.25e9)
"""Between two nodes of which nothing is known: 10 Gbit/s inside one zone."""


@dataclass(frozen=True, slots=True)
class Topology:
    """Devices and links.  A link is looked up by node pair, then by region pair."""

    devices: tuple[Device, ...]
    node_links: Mapping[tuple[str, str], Link] = field(default_factory=dict)
    region_links: Mapping[tuple[str, str], Link] = field(default_factory=dict)

    def link(self, source: Device, target: Device) -> Link:
        """The link that bytes from ``source`` to ``target`` take."""
        if source.node == target.node:
            return LOCAL_LINK
        by_node = self.node_links.get((source.node, target.node))
        if by_node is not None:
            return by_node
        return self.region_links.get((source.region, target.region), DEFAULT_LINK)

    def device(self, device_id: str) -> Device:
        """The device called ``device_id``.

        Raises:
            KeyError: there is none.
        """
        for device in self.devices:
            if device.id == device_id:
                return device
        raise KeyError(device_id)
