"""Slow links between real hosts: one script a host, for Linux's traffic control (tc).

A script shapes what its host sends, and what it receives where the topology names its NIC::

    eth0  htb   NIC out ──▶ uplink to a region ──▶ link to a host ──▶ netem: latency
          ifb   NIC in

What goes to or comes from hosts that the scripts don't name passes as before.  Hosts know nothing
of each other: of an uplink that the hosts of a region share, each gets an equal part.
"""

from __future__ import annotations

import math
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources

from ray_train_geo.cluster.topology import Device, Topology
from ray_train_geo.errors import SpecError

__all__ = ["RealHost", "tc_scripts"]

_FRAME_BYTES = 1500
_LEAST_QUEUE_PACKETS = 1000
_LEAST_ROUND_TRIP_S = 0.05
_UNLIMITED_BYTES_PER_S = 12.5e9
# Minor numbers of the classes: one NIC, then regions, then hosts; all others' traffic.
_NIC, _REGIONS, _HOSTS = 1, 0x100, 0x1000


@dataclass(frozen=True, slots=True)
class RealHost:
    """A machine that plays a node of a topology.

    Args:
        device: of the node; it says which region.
        address: IPv4, at which the others reach the machine.
        interface: its network interface with that address.
    """

    name: str
    device: Device
    address: str
    interface: str


def tc_scripts(topology: Topology, hosts: Sequence[RealHost], source: str) -> dict[str, str]:
    """A bash script for each host, by the host's name.

    Args:
        source: what the links are from, for the reader of a script.

    Raises:
        SpecError: two of the nodes have no link.
    """
    template = (resources.files("ray_train_geo.lab") / "tc_template.sh").read_text()
    return {
        host.name: template.replace("@NAME@", host.name)
        .replace("@NODE@", f"{host.device.node} in {host.device.region}")
        .replace("@SOURCE@", source)
        .replace("@INTERFACE@", shlex.quote(host.interface))
        .replace("  @OUTGOING@", _indented(_outgoing(topology, host, hosts)))
        .replace("  @INCOMING@", _indented(_incoming(topology, host, hosts)))
        for host in hosts
    }


def _outgoing(topology: Topology, me: RealHost, hosts: Sequence[RealHost]) -> Iterator[str]:
    """What host ``me`` sends.

    HTB gives a class its ``rate`` whatever its parent has, and up to ``ceil`` of what the parent
    has left.  So rates are equal parts, and limits are ceilings.
    """
    others = [h for h in hosts if h.name != me.name]
    own = topology.node_uplinks.get(me.device.node)
    nic = _UNLIMITED_BYTES_PER_S if own is None else own.out_bytes_per_s
    fair = nic / max(1, len(others))
    yield _class("9e0:", _NIC, nic, nic)
    inside = Counter(h.device.region for h in hosts)
    uplinks: dict[str, tuple[int, float]] = {}
    for region in sorted(inside):
        shared = topology.region_uplinks.get((me.device.region, region))
        if shared is not None and region != me.device.region:
            minor, mine = _REGIONS + len(uplinks), min(nic, shared / inside[me.device.region])
            uplinks[region] = minor, mine
            yield _class(f"9e0:{_NIC:x}", minor, min(mine, fair * inside[region]), mine)
    for number, other in enumerate(others):
        try:
            link = topology.link(me.device, other.device)
        except KeyError:
            raise SpecError(
                f"no link from {me.device.node} to {other.device.node}: name one in the topology, "
                "or a default link"
            ) from None
        parent, most = uplinks.get(other.device.region, (_NIC, math.inf))
        rate = min(link.bandwidth_bytes_per_s, nic, most)
        minor = _HOSTS + number
        share = min(rate, fair, most / inside[other.device.region])
        yield _class(f"9e0:{parent:x}", minor, share, rate)
        # The queue is a round trip's worth, after what travels.
        queue_s = link.latency_s + max(_LEAST_ROUND_TRIP_S, 2 * link.latency_s)
        packets = max(_LEAST_QUEUE_PACKETS, math.ceil(rate * queue_s / _FRAME_BYTES))
        yield (
            f'tc qdisc add dev "$interface" parent 9e0:{minor:x} '
            f"netem delay {round(link.latency_s * 1e6)}us limit {packets}"
        )
        yield (
            f'tc filter add dev "$interface" parent 9e0: protocol ip u32 '
            f"match ip dst {other.address}/32 flowid 9e0:{minor:x}  # {other.name}"
        )


def _incoming(topology: Topology, me: RealHost, hosts: Sequence[RealHost]) -> Iterator[str]:
    """What host ``me`` receives; that passes a device of its own, as only sending can be shaped."""
    nic = topology.node_uplinks.get(me.device.node)
    if nic is None:
        yield ":  # the topology names no NIC"
        return
    yield 'ip link add "$incoming" type ifb'
    yield 'ip link set "$incoming" up'
    yield 'tc qdisc add dev "$incoming" root handle 9e1: htb default 1'
    bits = _bits(nic.in_bytes_per_s)
    yield f'tc class add dev "$incoming" parent 9e1: classid 9e1:1 htb rate {bits} quantum 60000'
    yield 'tc qdisc add dev "$interface" handle ffff: ingress'
    for other in hosts:
        if other.name != me.name:
            yield (
                f'tc filter add dev "$interface" parent ffff: protocol ip u32 '
                f'match ip src {other.address}/32 action mirred egress redirect dev "$incoming"'
                f"  # {other.name}"
            )


def _class(parent: str, minor: int, rate: float, most: float) -> str:
    return (
        f'tc class add dev "$interface" parent {parent} classid 9e0:{minor:x} '
        f"htb rate {_bits(rate)} ceil {_bits(most)} quantum 60000"
    )


def _bits(bytes_per_s: float) -> str:
    return f"{max(8, round(8 * bytes_per_s))}bit"


def _indented(lines: Iterator[str]) -> str:
    return "\n".join(f"  {line}" for line in lines)
