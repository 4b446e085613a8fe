"""What happens to a packet between two hosts: pure queues, no clock and no sockets.

A packet waits its turn at everything that it shares with others, then travels for the latency::

                 ┌ of its own ┐  ┌─────────── shared ───────────┐
    send ──▶ flow ──▶ link ──▶ NIC out ──▶ uplink ──▶ NIC in ──▶ latency ± jitter ──▶ deliver

Times are computed, not measured: a packet enters the next queue when it left the one before,
however late anybody looked.  So a switch that gets its processor late delivers one packet late, and
rates stay what they are.

A queue that grows says so in the packets (ECN, RFC 3168), long before it loses any: the senders
slow down to its rate, and a link gives what it has, also at 300 ms, where TCP takes minutes to get
over a burst of losses.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from heapq import heappop, heappush

__all__ = ["Fabric", "Shape", "Traffic"]

Pair = tuple[int, int]

_LEAST_QUEUE_BYTES = 2 * 65536
"""A queue holds two of the largest packets that a host sends (TCP segmentation offload)."""
_QUEUE_ROUND_TRIPS = 4
_LEAST_MARKED_BYTES = 20 * 1500
_MARKED_ROUND_TRIPS = 0.5
"""CUBIC falls to 0.7 of what is in flight: with 0.43 of a round trip in the queue it stays busy."""
_LEAST_ROUND_TRIP_S = 0.05
_MOST_IDLE_FLOWS = 1024


@dataclass(frozen=True, slots=True)
class Shape:
    """A directed link between two hosts.

    Args:
        latency_s: one way.
        bytes_per_s: what all flows of the pair get together, headers included.
        flow_bytes_per_s: what one connection gets: a window per round trip.
        jitter_s: a packet takes up to so much longer (uniform); packets are not reordered.
        loss: chance of each Ethernet-sized packet to be lost.
    """

    latency_s: float = 0.0
    bytes_per_s: float = math.inf
    flow_bytes_per_s: float = math.inf
    jitter_s: float = 0.0
    loss: float = 0.0


@dataclass(slots=True)
class Traffic:
    """What a link carried, in packets and bytes as they are on the wire."""

    packets: int = 0
    size_bytes: int = 0
    lost: int = 0


class Fabric:
    """All links between some hosts.

    Args:
        links: by (from, to), numbers of hosts.
        deliver: called with the number of a host, a packet for it, and whether to mark the packet
            as one that met congestion.
        seed: of jitter and losses.
    """

    def __init__(
        self,
        links: Mapping[Pair, Shape],
        deliver: Callable[[int, bytes, bool], None],
        seed: int = 0,
    ) -> None:
        self._deliver = deliver
        self._random = random.Random(seed)
        self._events: list[tuple[float, int, _Queue | _Path]] = []
        self._number = 0
        self._shared: dict[str, _Queue] = {}
        self._paths = {pair: _Path(pair[1]) for pair in links}
        for pair, shape in links.items():
            self.shape(pair, shape)

    def shape(self, pair: Pair, shape: Shape) -> None:
        """Change a link; what is on its way already is not called back."""
        path = self._paths[pair]
        path.shape = shape
        path.link.set_rate(shape.bytes_per_s, 2 * shape.latency_s)

    def share(self, name: str, bytes_per_s: float, pairs: list[Pair]) -> None:
        """Let all packets of some pairs pass one queue, after those that they pass already."""
        queue = self._shared[name] = _Queue()
        queue.set_rate(bytes_per_s, 2 * max(self._paths[p].shape.latency_s for p in pairs))
        for pair in pairs:
            self._paths[pair].shared += (queue,)

    def cut(self, pair: Pair, down: bool) -> None:
        """From now on nothing arrives, not even what is on its way; or all does again."""
        self._paths[pair].down = down

    def shape_of(self, pair: Pair) -> Shape:
        return self._paths[pair].shape

    def traffic(self) -> dict[Pair, Traffic]:
        """What each link has carried so far."""
        return {pair: path.traffic for pair, path in self._paths.items()}

    def send(
        self, now_s: float, pair: Pair, packet: bytes, size_bytes: int, count: int, flow: bytes
    ) -> None:
        """A host sends.

        Args:
            size_bytes: on the wire; a packet that the host left to be cut up counts all headers.
            count: of packets on the wire.
            flow: names the connection.
        """
        path = self._paths[pair]
        traffic, shape = path.traffic, path.shape
        traffic.packets += count
        traffic.size_bytes += size_bytes
        lost = shape.loss and self._random.random() > (1 - shape.loss) ** count
        if path.down or lost:
            traffic.lost += count
            return
        route = (path.link, *path.shared)
        if shape.flow_bytes_per_s < shape.bytes_per_s:
            route = (path.flow(flow), *route)
        self._enter(now_s, _Parcel(packet, size_bytes, count, path, route))

    def next_s(self) -> float:
        """When something happens next; infinity when nothing is on its way."""
        return self._events[0][0] if self._events else math.inf

    def advance(self, now_s: float) -> None:
        """Let all happen that is due."""
        events = self._events
        while events and events[0][0] <= now_s:
            at_s, _, place = heappop(events)
            if isinstance(place, _Queue):
                self._leave(at_s, place)
            else:
                self._arrive(place)

    def _enter(self, now_s: float, parcel: _Parcel) -> None:
        """Into the next queue that is one, or on the way."""
        while parcel.route:
            queue, parcel.route = parcel.route[0], parcel.route[1:]
            if not queue.seconds_per_byte:
                continue
            if queue.waiting_bytes + parcel.size_bytes > queue.most_bytes and queue.parcels:
                parcel.path.traffic.lost += parcel.count
                return
            parcel.congested |= queue.waiting_bytes > queue.marked_bytes
            queue.waiting_bytes += parcel.size_bytes
            queue.parcels.append(parcel)
            if len(queue.parcels) == 1:
                self._schedule(now_s + parcel.size_bytes * queue.seconds_per_byte, queue)
            return
        path = parcel.path
        due_s = now_s + path.shape.latency_s
        if path.shape.jitter_s:
            due_s += self._random.uniform(0, path.shape.jitter_s)
        if path.travelling:
            due_s = max(due_s, path.travelling[-1][0])
        path.travelling.append((due_s, parcel))
        if len(path.travelling) == 1:
            self._schedule(due_s, path)

    def _leave(self, now_s: float, queue: _Queue) -> None:
        parcel = queue.parcels.popleft()
        queue.waiting_bytes -= parcel.size_bytes
        if queue.parcels:
            self._schedule(now_s + queue.parcels[0].size_bytes * queue.seconds_per_byte, queue)
        self._enter(now_s, parcel)

    def _arrive(self, path: _Path) -> None:
        _, parcel = path.travelling.popleft()
        if path.travelling:
            self._schedule(path.travelling[0][0], path)
        if path.down:
            path.traffic.lost += parcel.count
        else:
            self._deliver(path.target, parcel.packet, parcel.congested)

    def _schedule(self, at_s: float, place: _Queue | _Path) -> None:
        self._number += 1
        heappush(self._events, (at_s, self._number, place))


class _Queue:
    """Passes bytes at a rate, first come, first served; what finds it full is lost."""

    __slots__ = ("marked_bytes", "most_bytes", "parcels", "seconds_per_byte", "waiting_bytes")

    def __init__(self) -> None:
        self.parcels: deque[_Parcel] = deque()
        self.waiting_bytes = 0
        self.set_rate(math.inf, 0.0)

    def set_rate(self, bytes_per_s: float, round_trip_s: float) -> None:
        in_flight = bytes_per_s * max(_LEAST_ROUND_TRIP_S, round_trip_s)
        self.seconds_per_byte = 1 / bytes_per_s
        self.marked_bytes = max(_LEAST_MARKED_BYTES, _MARKED_ROUND_TRIPS * in_flight)
        self.most_bytes = max(_LEAST_QUEUE_BYTES, _QUEUE_ROUND_TRIPS * in_flight)


class _Path:
    """From one host to another: what is its own, what it shares, and what is travelling."""

    __slots__ = ("_flows", "down", "link", "shape", "shared", "target", "traffic", "travelling")

    def __init__(self, target: int) -> None:
        self.target = target
        self.shape = Shape()
        self.link = _Queue()
        self.shared: tuple[_Queue, ...] = ()
        self.travelling: deque[tuple[float, _Parcel]] = deque()
        self.down = False
        self.traffic = Traffic()
        self._flows: dict[bytes, _Queue] = {}

    def flow(self, name: bytes) -> _Queue:
        queue = self._flows.get(name)
        if queue is None:
            if len(self._flows) > _MOST_IDLE_FLOWS:
                self._flows = {n: q for n, q in self._flows.items() if q.parcels}
            queue = self._flows[name] = _Queue()
        queue.set_rate(self.shape.flow_bytes_per_s, 2 * self.shape.latency_s)
        return queue


class _Parcel:
    """A packet, and the queues that are still before it."""

    __slots__ = ("congested", "count", "packet", "path", "route", "size_bytes")

    def __init__(
        self, packet: bytes, size_bytes: int, count: int, path: _Path, route: tuple[_Queue, ...]
    ) -> None:
        self.packet = packet
        self.size_bytes = size_bytes
        self.count = count
        self.path = path
        self.route = route
        self.congested = False
