"""The devices that a spot trace puts at a job's disposal, and when they come and go.

::

    trace      add a, add b, remove a, add c        names and times
    hardware   what a node is: GPUs, region          or the nodes of a topology
       |
    fleet      t0 +a +b   t1 -a   t2 +c              all devices that are ever there, and changes
"""

from __future__ import annotations

import difflib
import math
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, pairwise

from ray_train_geo.cluster.gpus import gpu
from ray_train_geo.cluster.scenarios import scenario
from ray_train_geo.cluster.topology import DEFAULT_LINK, Device, Link, Topology, Uplink
from ray_train_geo.cluster.traces import SpotTrace, TraceEvent
from ray_train_geo.errors import SpecError

__all__ = ["Change", "Fleet", "Hardware", "fleet_of"]

_NIC = Uplink(DEFAULT_LINK.bandwidth_bytes_per_s, DEFAULT_LINK.bandwidth_bytes_per_s)
"""Of a node that only a catalog name describes: 10 Gbit/s each way, as AWS p3.2xlarge has at
best."""


@dataclass(frozen=True, slots=True)
class Hardware:
    """What the nodes of a trace are, as far as the trace does not say.

    Args:
        gpu: a type of the catalog; None where the trace must name one.
        regions: nodes are dealt to them in turn.
    """

    gpu: str | None = None
    gpus_per_node: int = 1
    regions: tuple[str, ...] = ("local",)


@dataclass(frozen=True, slots=True)
class Change:
    """What happens at one moment: those who leave go before those who join come.

    Args:
        joined, left, noticed: nodes.
    """

    time_s: float
    joined: tuple[str, ...] = ()
    left: tuple[str, ...] = ()
    noticed: tuple[str, ...] = ()


@dataclass(frozen=True)
class Fleet:
    """Devices over time.

    Args:
        topology: all devices that are ever there.  A node that comes back has kept its name, and
            nothing else.
        changes: in the order of time, at most one at each moment, all before ``end_s``.
    """

    topology: Topology
    changes: tuple[Change, ...]
    end_s: float

    @cached_property
    def devices_of(self) -> Mapping[str, tuple[Device, ...]]:
        """By node."""
        found: dict[str, list[Device]] = defaultdict(list)
        for device in self.topology.devices:
            found[device.node].append(device)
        return {node: tuple(devices) for node, devices in found.items()}

    def devices(self, nodes: Iterable[str]) -> tuple[Device, ...]:
        """All devices of ``nodes``."""
        return tuple(device for node in nodes for device in self.devices_of[node])

    @cached_property
    def phases(self) -> tuple[tuple[float, float, frozenset[str]], ...]:
        """``(start_s, end_s, nodes)``: stretches in which nobody comes or goes, from 0 to the end.

        They are of positive length, without gaps.
        """
        there: set[str] = set()
        at: list[tuple[float, frozenset[str]]] = [(0.0, frozenset())]
        for change in self.changes:
            there = (there - set(change.left)) | set(change.joined)
            at.append((change.time_s, frozenset(there)))
        at.append((self.end_s, frozenset()))
        return tuple((a[0], b[0], a[1]) for a, b in pairwise(at) if b[0] > a[0])

    @cached_property
    def _counts(self) -> tuple[list[float], list[float], list[int]]:
        """By phase: when it starts, device-seconds before it, devices in it."""
        starts, before, counts = [], [], []
        total = 0.0
        for start_s, end_s, nodes in self.phases:
            starts.append(start_s)
            before.append(total)
            counts.append(len(self.devices(nodes)))
            total += counts[-1] * (end_s - start_s)
        return starts, before, counts

    def device_s(self, start_s: float, end_s: float) -> float:
        """Device-seconds that are there between two moments."""
        return self._device_s_until(end_s) - self._device_s_until(start_s)

    def _device_s_until(self, time_s: float) -> float:
        starts, before, counts = self._counts
        i = max(0, bisect_right(starts, time_s) - 1)
        return before[i] + counts[i] * (time_s - starts[i])

    @property
    def mean_devices(self) -> float:
        """How many are there, averaged over time."""
        return self.device_s(0, self.end_s) / self.end_s

    def typical(self) -> frozenset[str]:
        """The nodes of a phase in which about as many devices are there as on average.

        The longest of several.
        """
        mean = self.mean_devices

        def unlike(phase: tuple[float, float, frozenset[str]]) -> tuple[float, float]:
            start_s, end_s, nodes = phase
            return abs(len(self.devices(nodes)) - mean), start_s - end_s

        return min(self.phases, key=unlike)[2]

    def largest(self) -> frozenset[str]:
        """The nodes of a phase in which most devices are there."""
        return max(self.phases, key=lambda p: len(self.devices(p[2])))[2]

    def mean_interval_s(self, *kinds: str) -> float:
        """From one moment at which nodes join, leave or are noticed to the next, on average.

        What is there from the start has not joined.

        Args:
            kinds: fields of :class:`Change` that count.
        """
        moments = sum(any(getattr(c, kind) for kind in kinds) for c in self.changes if c.time_s > 0)
        return self.end_s / max(1, moments)

    def steady(self) -> Fleet:
        """As many devices of each kind as this one has on average, all of the time.

        At least one node.
        """
        present_s: dict[str, float] = defaultdict(float)
        for start_s, end_s, nodes in self.phases:
            for node in nodes:
                present_s[node] += end_s - start_s
        alike: dict[object, list[str]] = defaultdict(list)
        for node in sorted(present_s, key=lambda n: (-present_s[n], n)):
            alike[_kind(self.devices_of[node])].append(node)
        # Largest remainders: whole nodes of each kind, and the right number of all together.
        quotas = {kind: sum(present_s[n] for n in ns) / self.end_s for kind, ns in alike.items()}
        counts = {kind: math.floor(quota) for kind, quota in quotas.items()}
        missing = max(1, round(sum(quotas.values()))) - sum(counts.values())
        for kind in sorted(quotas, key=lambda k: counts[k] - quotas[k])[:missing]:
            counts[kind] += 1
        chosen = [node for kind, ns in alike.items() for node in sorted(ns[: counts[kind]])]
        steady = self.topology.with_devices(self.devices(chosen))
        return Fleet(steady, (Change(0.0, tuple(chosen)),), self.end_s)


def fleet_of(
    trace: SpotTrace,
    hardware: Hardware | None = None,
    topology: Topology | None = None,
    max_nodes: int | None = None,
) -> Fleet:
    """The fleet that a trace means, on nodes of a kind or on those of a topology.

    A trace's node is the topology's node of that name, or else the first free one, in the
    topology's order, of the region and type that the trace asks for.  Who finds none free, or
    would be one too many, waits until another has left.

    Args:
        hardware: instead of a topology.
        max_nodes: nodes that are used at the same time.

    Raises:
        SpecError: the trace has no length; a node's GPU or region is not known; the regions have
            no known link; the topology has no node that fits.
    """
    if trace.end_s <= 0:
        raise SpecError(f"trace {trace.name}: it ends when it begins; say until when to replay it")
    added = [event for event in trace.events if event.op == "add"]
    if topology is None:
        topology = _described(trace.name, added, hardware or Hardware())
        fits = {event: [event.node] for event in added}
    else:
        fits = {event: _matching(trace.name, event, topology) for event in added}
    changes = tuple(_changes(trace, fits, max_nodes))
    used = {node for change in changes for node in change.joined}
    there = topology.with_devices(d for d in topology.devices if d.node in used)
    return Fleet(there, changes, trace.end_s)


def _changes(
    trace: SpotTrace, fits: Mapping[TraceEvent, Sequence[str]], max_nodes: int | None
) -> Iterator[Change]:
    """Moment by moment, who gets which node."""
    waiting: dict[str, Sequence[str]] = {}
    at: dict[str, str] = {}  # the node that each of the trace's nodes got
    for time_s, group in groupby(
        (e for e in trace.events if e.time_s < trace.end_s), key=lambda e: e.time_s
    ):
        joined: list[str] = []
        left: list[str] = []
        noticed: list[str] = []
        for event in group:
            name = event.node
            if event.op == "add":
                waiting[name] = fits[event]
            elif event.op == "notice":
                noticed += [at[name]] if name in at else []
            elif waiting.pop(name, None) is None:
                gone = at.pop(name)
                left.append(gone)
                noticed = [node for node in noticed if node != gone]  # too late
        for name, nodes in list(waiting.items()):
            if max_nodes is not None and len(at) >= max_nodes:
                break
            taken = set(at.values())
            free = next((node for node in nodes if node not in taken), None)
            if free is not None:
                at[name] = free
                joined.append(free)
                del waiting[name]
        if joined or left or noticed:
            yield Change(time_s, tuple(joined), tuple(left), tuple(noticed))


def _matching(trace: str, event: TraceEvent, topology: Topology) -> list[str]:
    """The topology's nodes that may stand for a node of the trace."""
    first_of = {d.node: d for d in reversed(topology.devices)}
    if event.node in first_of:
        return [event.node]
    wanted = None if event.gpu is None else gpu(event.gpu).name
    found = [
        d.node
        for d in reversed(first_of.values())
        if event.region in (None, d.region) and wanted in (None, d.type)
    ]
    if not found:
        asked = " in ".join(x for x in (event.gpu, event.region) if x)
        kind = f", which is {asked}" if asked else ""
        raise SpecError(f"trace {trace}: the topology has no node for {event.node}{kind}")
    return found


def _described(trace: str, added: Sequence[TraceEvent], hardware: Hardware) -> Topology:
    """A topology of all nodes that are ever added."""
    devices: dict[str, tuple[Device, ...]] = {}
    for event in added:
        turn = hardware.regions[len(devices) % len(hardware.regions)]
        kind = event.gpu or hardware.gpu
        if kind is None:
            raise SpecError(
                f"trace {trace}: it does not say what {event.node} is; give the GPU type of its "
                "nodes, or a topology"
            )
        found = tuple(
            gpu(kind).device(
                f"{event.node}/{i}", event.node, event.region or turn, market_type="spot"
            )
            for i in range(hardware.gpus_per_node)
        )
        before = devices.setdefault(event.node, found)
        known = event.region in (None, before[0].region) and event.gpu in (None, before[0].type)
        if not known:
            raise SpecError(
                f"trace {trace}: {event.node} comes back as another kind of node; give it another "
                "name"
            )
    everything = tuple(d for ds in devices.values() for d in ds)
    return Topology(
        everything,
        region_links=_links(sorted({d.region for d in everything})),
        node_uplinks=dict.fromkeys(devices, _NIC),
        default_link=None,
    )


def _links(regions: Sequence[str]) -> dict[tuple[str, str], Link]:
    """10 Gbit/s inside a region; DT-FM's measured links between those that it measured."""
    published = {**scenario("regional").region_links, **scenario("worldwide").region_links}
    known = sorted({region for pair in published for region in pair})
    links = {(r, r): DEFAULT_LINK for r in regions}
    for a in regions:
        for b in regions:
            if a == b:
                continue
            if (a, b) not in published:
                unknown = a if a not in known else b
                close = difflib.get_close_matches(unknown, known, n=1)
                hint = f"did you mean {close[0]}? " if close else ""
                raise SpecError(
                    f"no link is known between {a} and {b}: {hint}name regions of "
                    f"{', '.join(known)}, or give a topology"
                )
            links[a, b] = published[a, b]
    return links


def _kind(devices: Sequence[Device]) -> object:
    """Equal for nodes that hold the same in the same region."""
    return devices[0].region, tuple((d.type, d.flops_per_s, d.memory_bytes) for d in devices)
