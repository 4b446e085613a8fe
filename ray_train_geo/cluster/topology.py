"""What there is to train on: devices, and the directed links between them (level 0).

A topology is a value: the planner gets one and never asks a cluster anything::

    region ohio                    region virginia
    +-----------------+            +-----------------+
    | node a          |  link      | node c          |     a link is what one flow gets;
    |  a/0 a/1  =NIC=====-----. .-----=NIC=  c/0 c/1 |     an uplink is what all flows share:
    | node b          |        X   |                 |     of a node (its NIC), and from one
    |  b/0      =NIC=====-----' '-----  ...          |     region to another
    +-----------------+  region uplink ------------- +
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

__all__ = ["DEFAULT_LINK", "LOCAL_LINK", "Device", "Link", "MarketType", "Topology", "Uplink"]

MarketType = Literal["spot", "on-demand"]

_INITIAL_WINDOW_BYTES = 10 * 1460
"""What TCP sends before the first acknowledgement: 10 segments (RFC 6928)."""


@dataclass(frozen=True, slots=True)
class Device:
    """One GPU (or one CPU worker) that can hold a stage.

    Args:
        id: unique name, such as ``node-id/0``.
        type: hardware type, such as ``A100-80G`` or ``cpu``.
        flops_per_s: sustained FLOP/s on this job's layers, not the data sheet's peak.
        memory_bytes: memory that a stage may fill.
        price_per_hour: in US dollars.
        flops_by_precision: (precision, sustained FLOP/s) pairs, where the type is known but the job
            is not yet; :meth:`at_precision` makes one of them ``flops_per_s``.
    """

    id: str
    node: str
    region: str = "local"
    zone: str = ""
    market_type: MarketType = "on-demand"
    type: str = "cpu"
    flops_per_s: float = 2e10
    memory_bytes: int = 4 * 2**30
    price_per_hour: float = 0.0
    flops_by_precision: tuple[tuple[str, float], ...] = ()

    def at_precision(self, precision: str) -> Device:
        """This device with the ``flops_per_s`` that it sustains at ``precision``."""
        known = dict(self.flops_by_precision)
        if not known:
            return self
        return dataclasses.replace(
            self, flops_per_s=known.get(precision, self.flops_per_s), flops_by_precision=()
        )


@dataclass(frozen=True, slots=True)
class Link:
    """A directed link, as one message sees it.

    Args:
        latency_s: one way, in seconds.
        bandwidth_bytes_per_s: what the path carries.
        window_bytes: most bytes in flight: TCP sends at most one window per round trip and flow.
        flows: over which a message goes.
    """

    latency_s: float
    bandwidth_bytes_per_s: float
    window_bytes: float = math.inf
    flows: int = 1

    @property
    def flow_bytes_per_s(self) -> float:
        """What warm flows get: the bandwidth, or their windows per round trip if that is less."""
        if self.latency_s <= 0 or math.isinf(self.window_bytes):
            return self.bandwidth_bytes_per_s
        return min(
            self.bandwidth_bytes_per_s, self.flows * self.window_bytes / (2 * self.latency_s)
        )

    def striped(self, most: int) -> Link:
        """This link with as many flows as fill it, and at most ``most``."""
        if self.latency_s <= 0 or math.isinf(self.window_bytes):
            return self
        full = self.bandwidth_bytes_per_s * 2 * self.latency_s
        flows = max(1, min(most, math.ceil(full / self.window_bytes)))
        return dataclasses.replace(self, flows=flows)

    def transfer_s(self, size_bytes: float) -> float:
        """Time from the start of a send to the arrival of its last byte on a warm link."""
        return self.latency_s + size_bytes / self.flow_bytes_per_s

    def ramp_s(self, size_bytes: float) -> float:
        """What a cold link takes longer: TCP's slow start doubles its window every round trip.

        Round ``k`` carries ``w0 * 2**k`` bytes, until the window fills the link or all is sent
        (Cardwell et al., "Modeling TCP Latency", INFOCOM 2000, without losses).
        """
        rtt_s, rate = 2 * self.latency_s, self.flow_bytes_per_s
        if rtt_s <= 0 or math.isinf(rate):
            return 0.0
        lost_s, window, sent = 0.0, float(self.flows * _INITIAL_WINDOW_BYTES), 0.0
        while sent < size_bytes and window < rate * rtt_s:
            lost_s += rtt_s - min(window, size_bytes - sent) / rate
            sent += window
            window *= 2
        # After the last round nothing is waited for: all has been sent.
        return lost_s if sent < size_bytes else max(0.0, lost_s - rtt_s)


@dataclass(frozen=True, slots=True)
class Uplink:
    """What all flows out of (or into) a node share, in bytes per second."""

    out_bytes_per_s: float
    in_bytes_per_s: float


LOCAL_LINK = Link(latency_s=5e-5, bandwidth_bytes_per_s=2.5e9)
"""Between two workers on one node (gloo over loopback, measured 2.5-3.4 GB/s)."""

DEFAULT_LINK = Link(latency_s=2.5e-4, bandwidth_bytes_per_s=1.25e9)
"""Between two nodes of which nothing is known: 10 Gbit/s inside one zone."""


@dataclass(frozen=True, slots=True)
class Topology:
    """Devices, links and what links share.

    A link is looked up by node pair, then by region pair.

    Args:
        node_links: by (from node, to node); (n, n) is between the devices of node ``n``.
        region_links: by (from region, to region); (r, r) is between the nodes of region ``r``.
        node_uplinks: by node, what all its flows to other nodes share.
        region_uplinks: by (from region, to region), bytes per second that all flows share.
        default_link: for pairs that no link names.  None: every pair must have one.
    """

    devices: tuple[Device, ...]
    node_links: Mapping[tuple[str, str], Link] = field(default_factory=dict)
    region_links: Mapping[tuple[str, str], Link] = field(default_factory=dict)
    node_uplinks: Mapping[str, Uplink] = field(default_factory=dict)
    region_uplinks: Mapping[tuple[str, str], float] = field(default_factory=dict)
    default_link: Link | None = DEFAULT_LINK

    def link(self, source: Device, target: Device) -> Link:
        """The link that bytes from ``source`` to ``target`` take.

        Raises:
            KeyError: none is named, and there is no default.
        """
        by_node = self.node_links.get((source.node, target.node))
        if by_node is not None:
            return by_node
        if source.node == target.node:
            return LOCAL_LINK
        by_region = self.region_links.get((source.region, target.region))
        if by_region is not None:
            return by_region
        if source.region == target.region:
            return DEFAULT_LINK if self.default_link is None else self.default_link
        if self.default_link is None:
            raise KeyError((source.region, target.region))
        return self.default_link

    def device(self, device_id: str) -> Device:
        """The device called ``device_id``.

        Raises:
            KeyError: there is none.
        """
        for device in self.devices:
            if device.id == device_id:
                return device
        raise KeyError(device_id)

    def at_precision(self, precision: str) -> Topology:
        """This topology with every device's ``flops_per_s`` at ``precision``."""
        return self.with_devices(d.at_precision(precision) for d in self.devices)

    def striped(self, most: int) -> Topology:
        """The same network used with as many flows a link as fill it, and at most ``most``."""
        return dataclasses.replace(
            self,
            node_links={pair: link.striped(most) for pair, link in self.node_links.items()},
            region_links={pair: link.striped(most) for pair, link in self.region_links.items()},
            default_link=None if self.default_link is None else self.default_link.striped(most),
        )

    def with_devices(self, devices: Iterable[Device]) -> Topology:
        """The same network with other devices on it."""
        return dataclasses.replace(self, devices=tuple(devices))
