"""What a run has learnt of its topology since that was measured: what is slower than it was.

A correction that nothing confirms - a link that is avoided carries nothing, a device that is left
out computes nothing - is on parole: after five minutes it is dropped, so that the planner may try
again, and after twice as long each time that it had to be made again.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from ray_train_geo.cluster.topology import Device, Link, Topology
from ray_train_geo.planning.slow_links import LinkChange, NodePair
from ray_train_geo.planning.stragglers import Straggler

__all__ = ["Corrections"]

_PAROLE_S = 300.0

_AS_MEASURED = 0.8
"""What has come back to so much of its measured speed has that speed again."""

_Key = str | NodePair


@dataclass(frozen=True, slots=True)
class _Corrected:
    """What a figure is taken for, and until when."""

    value: float
    until_s: float


class Corrections:
    """Of FLOP/s (by device) and bandwidth (by node pair).

    Topologies are always those that were measured, without corrections; times are in seconds of any
    clock that does not jump.
    """

    def __init__(self) -> None:
        self._known: dict[_Key, _Corrected] = {}
        self._made: Counter[_Key] = Counter()

    def apply(self, measured: Topology) -> Topology:
        """The topology as it is taken to be; a correction makes nothing faster."""
        known = self._known
        if not known:
            return measured
        devices = [
            dataclasses.replace(d, flops_per_s=min(d.flops_per_s, known[d.id].value))
            if d.id in known
            else d
            for d in measured.devices
        ]
        links = dict(measured.node_links)
        for pair, link in _links(measured):
            if pair in known:
                slower = min(link.bandwidth_bytes_per_s, known[pair].value)
                links[pair] = dataclasses.replace(link, bandwidth_bytes_per_s=slower)
        return dataclasses.replace(measured, devices=tuple(devices), node_links=links)

    def straggler(self, found: Straggler, measured: Topology, now_s: float) -> bool:
        """A device's speed has changed; whether that is news."""
        speed = measured.device(found.device).flops_per_s
        return self._set(found.device, self._value(found.device, speed) / found.ratio, speed, now_s)

    def link(
        self, found: LinkChange, measured: Topology, sound: Collection[NodePair], now_s: float
    ) -> list[NodePair]:
        """A link has changed; returns the node pairs of which that is news.

        Nodes of two regions share the way between these: what one pair of them sees is taken to be
        so for all.

        Args:
            sound: pairs that are in use and have not changed.
        """
        links = dict(_links(measured))
        region = {d.node: d.region for d in measured.devices}
        from_region, to_region = (region[node] for node in found.pair)
        alike = [
            (a, b)
            for a, b in links
            if from_region != to_region
            and (region[a], region[b]) == (from_region, to_region)
            and (a, b) not in sound
        ]
        changed = []
        for pair in {found.pair: None, **dict.fromkeys(alike)}:
            rate = links[pair].bandwidth_bytes_per_s
            now = self._value(pair, rate)
            if found.ratio > 1:
                now = min(now, found.bytes_per_s)
            else:
                now = max(now / found.ratio, found.bytes_per_s)
            if self._set(pair, now, rate, now_s):
                changed.append(pair)
        return changed

    def confirm(self, keys: Collection[_Key], now_s: float) -> None:
        """These devices and node pairs are in use: what is known of them holds."""
        for key in self._known.keys() & set(keys):
            self._known[key] = _Corrected(self._known[key].value, self._parole(key, now_s))

    def expire(self, now_s: float) -> list[_Key]:
        """Drop, and return, what has not been confirmed for too long."""
        over = [key for key, corrected in self._known.items() if now_s >= corrected.until_s]
        self._known = {key: c for key, c in self._known.items() if key not in over}
        return over

    def _value(self, key: _Key, measured: float) -> float:
        return min(measured, self._known[key].value) if key in self._known else measured

    def _set(self, key: _Key, value: float, measured: float, now_s: float) -> bool:
        before = self._known.get(key)
        if value >= _AS_MEASURED * measured:
            self._known = {k: c for k, c in self._known.items() if k != key}
            return before is not None
        if before is None:
            self._made[key] += 1
        self._known = {**self._known, key: _Corrected(value, self._parole(key, now_s))}
        return True

    def _parole(self, key: _Key, now_s: float) -> float:
        return now_s + _PAROLE_S * 2.0 ** (self._made[key] - 1)


def _links(topology: Topology) -> Iterator[tuple[NodePair, Link]]:
    """All links between nodes that there are."""
    nodes: dict[str, Device] = {}
    for device in topology.devices:
        nodes.setdefault(device.node, device)
    for a in nodes.values():
        for b in nodes.values():
            if a is not b:
                try:
                    yield (a.node, b.node), topology.link(a, b)
                except KeyError:
                    continue
