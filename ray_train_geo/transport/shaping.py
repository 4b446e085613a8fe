"""Links as slow as a topology says, inside the transport: for where the network can't be shaped.

Everything here is *simulated*: it shows what waiting for a link does to a step, not what TCP does
on one (slow start, windows, losses, and the round trip that a message costs whose receive was not
posted ahead).

A message leaves through the token buckets of its path (:mod:`ray_train_geo.transport.paths`), and
is handed to the wrapped transport a latency after its last byte.

Collectives are made of such messages: ``all_reduce`` a ring, the others direct.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from itertools import cycle

import torch

from ray_train_geo.cluster.topology import Topology
from ray_train_geo.errors import AbortedError, DeadlineError, PlanError
from ray_train_geo.planning.link_table import LinkTable
from ray_train_geo.planning.slow_links import Traffic
from ray_train_geo.transport import collectives
from ray_train_geo.transport.base import Pending, Transport
from ray_train_geo.transport.paths import Path, TokenBucket

__all__ = ["ShapedTransport", "Shaper"]


class Shaper:
    """All paths of a topology, as far as this process sends over them.

    What several devices share - their node's NIC, an uplink between regions - is shared by those
    whose transports have the same shaper: by all of them where they are threads, by nobody where
    each is a process of its own.
    """

    def __init__(self, topology: Topology) -> None:
        self._table = LinkTable.of(topology)
        self._lock = threading.Lock()
        self._buckets: dict[tuple[str, int, int], TokenBucket] = {}
        self._paths: dict[tuple[int, int], Path] = {}

    def wrap(
        self,
        transport: Transport,
        devices: Sequence[str],
        deadline_s: float,
        second: Transport | None = None,
    ) -> ShapedTransport:
        """``transport``, slowed down.

        Args:
            devices: ``[size]``; the device id of each rank of the group.
            deadline_s: longest wait for a peer to take a message that has arrived.
            second: as :class:`ShapedTransport` has it.

        Raises:
            PlanError: a device is not in the topology, or two have no link.
        """
        mine = devices[transport.rank]
        others = [(p, device) for p, device in enumerate(devices) if p != transport.rank]
        paths = {p: self.path(mine, device) for p, device in others}
        return ShapedTransport(transport, paths, deadline_s, second)

    def path(self, source: str, target: str) -> Path:
        """The path from one device to another; all who ask for it share it.

        Raises:
            PlanError: as :meth:`wrap`.
        """
        with self._lock:
            for device in (source, target):
                if device not in self._table.index:
                    raise PlanError(
                        f"device {device} is not in the topology whose links are emulated"
                    )
            pair = self._table.index[source], self._table.index[target]
            if pair not in self._paths:
                self._paths[pair] = Path(*self._link(*pair), self._lock)
            return self._paths[pair]

    def change(self, topology: Topology) -> None:
        """Be as slow as ``topology`` from now on; it has the same devices.

        Raises:
            PlanError: two devices that talk have no link any more; then nothing has changed.
        """
        with self._lock:
            before, self._table = self._table, LinkTable.of(topology)
            try:
                links = {pair: self._link(*pair) for pair in self._paths}
            except PlanError:
                self._table = before
                raise
            for pair, path in self._paths.items():
                path.change(*links[pair])

    def traffic(self, source: str) -> dict[str, Traffic]:
        """What has left the device ``source`` so far, by the node that it went to."""
        found: dict[str, Traffic] = {}
        with self._lock:
            table = self._table
            for (a, b), path in self._paths.items():
                if table.devices[a].id == source and table.node[a] != table.node[b]:
                    node = table.devices[b].node
                    found[node] = found.get(node, Traffic()) + path.traffic
        return found

    def _link(self, a: int, b: int) -> tuple[float, tuple[TokenBucket, ...]]:
        """Latency and buckets on the way from device ``a`` to device ``b``."""
        latency_s, per_byte = self._table.hop(a, b)
        if math.isinf(latency_s):
            source, target = (self._table.devices[d].id for d in (a, b))
            raise PlanError(
                f"there is no link from device {source} to device {target}; name one in "
                "the topology, or a default link"
            )
        return latency_s, self._on_the_way(a, b, per_byte)

    def _on_the_way(self, a: int, b: int, per_byte: float) -> tuple[TokenBucket, ...]:
        """The link's own bucket, and between nodes those of NICs and uplink."""
        table = self._table
        own = TokenBucket(per_byte)
        out, into = int(table.node[a]), int(table.node[b])
        if out == into:
            return (own,)
        r, q = int(table.region[a]), int(table.region[b])
        shared = (
            (("out", out, 0), table.out_seconds_per_byte[out]),
            (("in", into, 0), table.in_seconds_per_byte[into]),
            (("uplink", r, q), table.uplink_seconds_per_byte[r, q]),
        )
        buckets = [own]
        for key, rate in shared:
            bucket = self._buckets.get(key)
            if bucket is None and rate > 0:
                bucket = self._buckets[key] = TokenBucket(float(rate))
            if bucket is not None:
                bucket.seconds_per_byte = float(rate)
                buckets.append(bucket)
        return tuple(buckets)


class ShapedTransport:
    """A group whose messages take the time of simulated links.

    It carries tensors in host memory.  A send's wait returns when its last byte has left.  A group
    is for messages or for collectives, as theirs would be taken for each other.

    Args:
        inner: what carries the messages.
        paths: to each peer.
        deadline_s: longest wait for a peer to take a message that has arrived, and for each turn
            of a collective.
        second: another group of the same ranks, which carries every other ring: so two are under
            way at a time over the same links, as gloo has them.
    """

    def __init__(
        self,
        inner: Transport,
        paths: dict[int, Path],
        deadline_s: float,
        second: Transport | None = None,
    ) -> None:
        self.rank = inner.rank
        self.size = inner.size
        self._inner = inner
        self._deadline_s = deadline_s
        self._aborted = threading.Event()
        carriers = [inner] if second is None else [inner, second]
        self._lanes = {
            peer: _Lane(carriers, peer, path, self._aborted, deadline_s)
            for peer, path in paths.items()
        }
        self._carried = [_Carried(carrier, self._lanes) for carrier in carriers]
        self._rings = cycle(self._carried)
        self._started: deque[Future[Pending]] = deque()

    def __repr__(self) -> str:
        return f"<rank {self.rank} of {self.size} over simulated links, carried by {self._inner!r}>"

    def send(self, tensor: torch.Tensor, peer: int) -> Pending:
        return self._carried[0].send(tensor, peer)

    def recv(self, tensor: torch.Tensor, peer: int) -> Pending:
        return self._carried[0].recv(tensor, peer)

    def all_reduce(self, tensor: torch.Tensor) -> Pending:
        carried = next(self._rings)

        def ring() -> Pending:
            collectives.ring_all_reduce(carried, tensor, self._deadline_s)
            return collectives.Together(())

        return self._collective("all-reduce", ring, carried)

    def reduce_scatter(self, tensor: torch.Tensor, shards: Sequence[int]) -> Pending:
        return self._collective(
            "reduce-scatter",
            lambda: collectives.reduce_scatter(self, tensor, shards),
            self._carried[0],
        )

    def all_gather(self, tensor: torch.Tensor, shards: Sequence[int]) -> Pending:
        return self._collective(
            "all-gather",
            lambda: collectives.all_gather(self, tensor, shards),
            self._carried[0],
        )

    def all_to_all(
        self,
        outgoing: torch.Tensor,
        sent: Sequence[int],
        incoming: torch.Tensor,
        received: Sequence[int],
    ) -> Pending:
        return self._collective(
            "all-to-all",
            lambda: collectives.all_to_all(self, outgoing, sent, incoming, received),
            self._carried[0],
        )

    def _collective(self, what: str, start: Callable[[], Pending], carried: _Carried) -> Pending:
        # A thread a carrier: its collectives start in the same order on all ranks, and a ring ends
        # before the next one starts, as nothing tells their messages apart.
        if self._aborted.is_set():
            raise AbortedError(f"{what} over simulated links: the transport was aborted")
        while self._started and self._started[0].done():
            self._started.popleft()
        started = carried.collectives.submit(start)
        self._started.append(started)
        return _Collective(started, what)

    def synchronize(self, timeout_s: float) -> None:
        for started in self._started:
            _Collective(started, "a collective").wait(timeout_s)
        for lane in self._lanes.values():
            lane.synchronize(timeout_s)
        for carried in self._carried:
            carried.carrier.synchronize(timeout_s)

    def abort(self) -> None:
        self._aborted.set()
        for carried in self._carried:
            carried.carrier.abort()

    def close(self) -> None:
        """As :meth:`Transport.close`, once all messages have arrived."""
        for carried in self._carried:
            carried.collectives.shutdown()
        for lane in self._lanes.values():
            lane.close()
        for carried in self._carried:
            carried.carrier.close()


class _Carried:
    """What one group carries over the lanes: messages, and collectives one behind the other."""

    def __init__(self, carrier: Transport, lanes: Mapping[int, _Lane]) -> None:
        self.rank, self.size = carrier.rank, carrier.size
        self.carrier = carrier
        self.collectives = ThreadPoolExecutor(1, thread_name_prefix="shaped-collectives")
        self._lanes = lanes

    def send(self, tensor: torch.Tensor, peer: int) -> Pending:
        return self._lanes[peer].send(tensor, self.carrier)

    def recv(self, tensor: torch.Tensor, peer: int) -> Pending:
        return self.carrier.recv(tensor, peer)


class _Lane:
    """Messages to one peer: they leave in order, and arrive in order, while others leave.

    A peer that does not yet take the messages of one carrier holds up none of the other's.
    """

    def __init__(
        self,
        carriers: Sequence[Transport],
        peer: int,
        path: Path,
        aborted: threading.Event,
        deadline_s: float,
    ) -> None:
        self._peer = peer
        self._path = path
        self._aborted = aborted
        self._deadline_s = deadline_s
        self._what = f"sending to rank {peer} over a simulated link (rank {carriers[0].rank})"
        self._leaving = ThreadPoolExecutor(1, thread_name_prefix=f"shaped-leaving-{peer}")
        self._arriving = {
            carrier: ThreadPoolExecutor(1, thread_name_prefix=f"shaped-arriving-{peer}")
            for carrier in carriers
        }
        self._arrivals: deque[Future[None]] = deque()

    def send(self, tensor: torch.Tensor, carrier: Transport) -> Pending:
        if tensor.is_cuda:
            raise ValueError("simulated links carry tensors in host memory only")
        if self._aborted.is_set():
            raise AbortedError(f"{self._what}: the transport was aborted")
        while self._arrivals and self._arrivals[0].done():
            self._arrivals.popleft().result()  # a message that the peer never got
        leaving = self._leaving.submit(self._leave, tensor, carrier, time.monotonic())
        return _Leaving(leaving, self._what)

    def _leave(self, tensor: torch.Tensor, carrier: Transport, ready_s: float) -> None:
        message = tensor.clone()  # the caller may change it when it has left, and we need it later
        left_s = ready_s
        for left_s in self._path.leave(message.nbytes, ready_s):
            self._sleep_until(left_s)
        arrival_s = left_s + self._path.latency_s
        arriving = self._arriving[carrier]
        self._arrivals.append(arriving.submit(self._arrive, message, carrier, arrival_s))

    def _arrive(self, message: torch.Tensor, carrier: Transport, arrival_s: float) -> None:
        self._sleep_until(arrival_s)
        carrier.send(message, self._peer).wait(self._deadline_s)

    def _sleep_until(self, when_s: float) -> None:
        if self._aborted.wait(max(0.0, when_s - time.monotonic())):
            raise AbortedError(f"{self._what}: the transport was aborted")

    def synchronize(self, timeout_s: float) -> None:
        """Wait until the peer has all that was sent."""
        all_left = self._leaving.submit(lambda: None)
        _Leaving(all_left, self._what).wait(timeout_s)
        for arrival in list(self._arrivals):
            _Leaving(arrival, self._what).wait(timeout_s)

    def close(self) -> None:
        self._leaving.shutdown()
        for arriving in self._arriving.values():
            arriving.shutdown()


class _Leaving:
    """A message on its way out."""

    def __init__(self, left: Future[None], what: str) -> None:
        self._left = left
        self._what = what

    def wait(self, timeout_s: float) -> None:
        try:
            self._left.result(timeout_s)
        except (FutureTimeoutError, TimeoutError):
            raise DeadlineError(f"{self._what}: it took longer than {timeout_s:.1f} s") from None


class _Collective:
    """A collective that another thread starts (and, for a ring, carries out)."""

    def __init__(self, started: Future[Pending], what: str) -> None:
        self._started = started
        self._what = what

    def wait(self, timeout_s: float) -> None:
        try:
            operations = self._started.result(timeout_s)
        except (FutureTimeoutError, TimeoutError):
            raise DeadlineError(
                f"{self._what} over simulated links: it took longer than {timeout_s:.1f} s"
            ) from None
        operations.wait(timeout_s)
