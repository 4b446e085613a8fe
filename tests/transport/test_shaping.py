"""Simulated links: never faster than their figures, hardly slower; order, overlap, abort."""

from __future__ import annotations

import statistics
import time
from functools import partial

import pytest
import torch
from at_once import each
from memory_group import MemoryTransport, memory_group
from torch.distributed import HashStore

from ray_train_geo.cluster.topology import Device, Link, Topology, Uplink
from ray_train_geo.errors import AbortedError, DeadlineError, PlanError, TransportError
from ray_train_geo.transport.gloo import GlooEndpoint, GlooTransport
from ray_train_geo.transport.shaping import ShapedTransport, Shaper

LATE_S = 0.02  # what a busy machine may add to a wait
KB = 250  # float32 elements


def topology(
    link: Link, back: Link | None = None, *, devices: int = 2, nic: Uplink | None = None
) -> Topology:
    """Devices ``d0``, ``d1``, ... on nodes of their own; ``back`` is from later to earlier ones."""
    names = [f"n{i}" for i in range(devices)]
    return Topology(
        tuple(Device(f"d{i}", name) for i, name in enumerate(names)),
        node_links={
            (a, b): link if a < b else back or link for a in names for b in names if a != b
        },
        node_uplinks={} if nic is None else dict.fromkeys(names, nic),
    )


def shaped(network: Topology) -> list[ShapedTransport]:
    """All of the topology's devices as one group, over queues."""
    devices = [device.id for device in network.devices]
    shaper = Shaper(network)
    return [shaper.wrap(t, devices, deadline_s=5.0) for t in memory_group(len(devices))]


# ------------------------------------------------------------------ real time


def arrivals_s(sender: ShapedTransport, receiver: ShapedTransport, sizes: list[int]) -> list[float]:
    """Seconds from sending everything at once until each message is there."""
    tensors = [torch.full((size,), float(i)) for i, size in enumerate(sizes)]
    received = [torch.zeros(size) for size in sizes]
    start_s = time.monotonic()
    pending = [sender.send(t, receiver.rank) for t in tensors]
    seconds = []
    for tensor in received:
        receiver.recv(tensor, sender.rank).wait(5.0)
        seconds.append(time.monotonic() - start_s)
    for p in pending:
        p.wait(5.0)
    assert all(torch.equal(t, r) for t, r in zip(tensors, received, strict=True)), "in order"
    return seconds


def test_messages_arrive_when_they_should() -> None:
    # 1 MB/s one way, 4 MB/s the other: 10 KB take 10 ms and 2.5 ms, and they don't meet.
    a, b = shaped(topology(Link(0.03, 1e6), Link(0.01, 4e6)))
    seconds: dict[int, list[float]] = {}

    def measure(sender: ShapedTransport, receiver: ShapedTransport) -> None:
        seconds[sender.rank] = arrivals_s(sender, receiver, [10 * KB] * 10)

    each([partial(measure, a, b), partial(measure, b, a)])
    for sender, latency_s, each_s in ((0, 0.03, 0.01), (1, 0.01, 0.0025)):
        due_s = [latency_s + each_s * (i + 1) for i in range(10)]
        late_s = [found - due for found, due in zip(seconds[sender], due_s, strict=True)]
        assert min(late_s) >= -1e-4
        assert statistics.median(late_s) < LATE_S
        assert late_s[-1] < late_s[0] + LATE_S, "lateness does not add up"


def test_a_send_returns_at_once_and_is_done_when_it_has_left() -> None:
    a, b = shaped(topology(Link(0.2, 1e6)))
    message, received = torch.ones(50 * KB), torch.zeros(50 * KB)
    start_s = time.monotonic()
    pending = a.send(message, 1)
    assert time.monotonic() - start_s < LATE_S
    with pytest.raises(DeadlineError, match=r"sending to rank 1 over a simulated link"):
        pending.wait(0.01)
    pending.wait(5.0)
    assert 0.05 <= time.monotonic() - start_s < 0.05 + LATE_S * 3
    message.zero_()  # it has left: what happens to it here does not matter any more
    b.recv(received, 0).wait(5.0)
    assert time.monotonic() - start_s >= 0.25
    assert received.sum() == 50 * KB


def test_threads_share_a_nic() -> None:
    network = topology(Link(0.0, 1e9), devices=3, nic=Uplink(1e6, 1e9))
    a, b, c = shaped(network)
    start_s = time.monotonic()
    each(
        [
            partial(arrivals_s, a, b, [40 * KB]),
            partial(arrivals_s, a, c, [40 * KB]),
        ]
    )
    assert time.monotonic() - start_s >= 0.08


@pytest.mark.parametrize(
    ("verb", "latencies", "parts"),
    [("all_reduce", 4, 4 / 3), ("reduce_scatter", 1, 1 / 3), ("all_gather", 1, 1 / 3)],
)
def test_collectives_take_what_their_messages_take(verb: str, latencies: int, parts: float) -> None:
    """Three ranks: a ring is 2 (n - 1) turns of a third each; direct ones send a third to each.

    The fastest of a few: what else the machine does can only make them slower.
    """
    group = shaped(topology(Link(0.02, 1e6), devices=3, nic=Uplink(1e9, 1e9)))
    shards = [10 * KB] * 3

    def took_s() -> float:
        tensors = [torch.arange(30.0 * KB) for _ in group]
        start_s = time.monotonic()
        pending = [
            getattr(transport, verb)(*([t] if verb == "all_reduce" else [t, shards]))
            for transport, t in zip(group, tensors, strict=True)
        ]
        for p in pending:
            p.wait(5.0)
        seconds = time.monotonic() - start_s
        if verb == "all_reduce":
            assert all(torch.equal(t, 3 * torch.arange(30.0 * KB)) for t in tensors)
        return seconds

    due_s = latencies * 0.02 + parts * 0.03
    assert due_s - 1e-4 <= min(took_s() for _ in range(4)) < due_s + 2 * LATE_S


def test_collectives_keep_their_order() -> None:
    group = shaped(topology(Link(0.001, 1e8)))
    tensors = [[torch.full((8,), float(i)) for i in range(4)] for _ in group]
    pending = []
    for transport, mine in zip(group, tensors, strict=True):
        pending += [transport.all_reduce(mine[0]), transport.reduce_scatter(mine[1], [8, 0])]
        pending += [transport.all_reduce(mine[2]), transport.all_reduce(mine[3])]
    for p in pending:
        p.wait(5.0)
    assert [float(t[0]) for t in tensors[0]] == [0.0, 2.0, 4.0, 6.0]
    assert [float(t[0]) for t in tensors[1]] == [0.0, 1.0, 4.0, 6.0]


def test_two_rings_at_a_time_hide_each_others_latency() -> None:
    """Four rings over two carriers take what two take over one, and the sums are right."""
    network = topology(Link(0.1, 1e9))
    shaper, devices = Shaper(network), [d.id for d in network.devices]
    carriers = zip(memory_group(len(devices)), memory_group(len(devices)), strict=True)
    group = [shaper.wrap(first, devices, 5.0, second) for first, second in carriers]
    tensors = [[torch.full((8,), float(i)) for i in range(4)] for _ in group]
    start_s = time.monotonic()
    pending = [
        transport.all_reduce(tensor)
        for transport, mine in zip(group, tensors, strict=True)
        for tensor in mine
    ]
    for p in pending:
        p.wait(5.0)
    ring_s = 2 * (len(devices) - 1) * 0.1
    assert 2 * ring_s - 1e-4 <= time.monotonic() - start_s < 3.5 * ring_s
    for mine in tensors:
        assert [float(t[0]) for t in mine] == [len(devices) * float(i) for i in range(4)]
    for transport in group:
        transport.close()


# ------------------------------------------------------------------ ends


def test_closing_lets_messages_arrive() -> None:
    inner = memory_group(2)
    shaper = Shaper(topology(Link(0.05, 1e6)))
    a, b = (shaper.wrap(t, ["d0", "d1"], 5.0) for t in inner)
    a.send(torch.ones(3), 1)
    a.synchronize(5.0)
    a.send(torch.ones(3), 1)
    a.close()
    assert inner[0].closed
    for _ in range(2):
        received = torch.zeros(3)
        b.recv(received, 0).wait(0.0)
        assert received.sum() == 3


def test_an_abort_releases_everyone_at_once() -> None:
    store, made = HashStore(), dict[int, tuple[GlooTransport, ShapedTransport]]()
    shaper = Shaper(topology(Link(5.0, 1e3)))

    def join(rank: int) -> None:
        inner = GlooEndpoint(store, "127.0.0.1", 20.0).connect("test", rank, 2)
        made[rank] = inner, shaper.wrap(inner, ["d0", "d1"], 20.0)

    each([partial(join, rank) for rank in range(2)])
    released: list[float] = []

    def blocked(rank: int, verb: str) -> None:
        transport, tensor = made[rank][1], torch.zeros(10 * KB)
        pending = (
            transport.all_reduce(tensor)
            if verb == "all_reduce"
            else getattr(transport, verb)(tensor, 1 - rank)
        )
        with pytest.raises(TransportError):
            pending.wait(20.0)
        released.append(time.monotonic())

    def abort() -> None:
        time.sleep(0.1)
        made[0][1].abort()

    start_s = time.monotonic()
    each([partial(blocked, 0, "send"), partial(blocked, 1, "recv"), abort])
    assert max(released) - start_s < 1.0
    for verb in ("send", "recv"):
        with pytest.raises(TransportError):
            getattr(made[0][1], verb)(torch.zeros(3), 1)
    with pytest.raises(AbortedError):
        made[0][1].all_reduce(torch.zeros(3))
    for _, transport in made.values():
        transport.abort()
        transport.close()
    assert time.monotonic() - start_s < 2.0


def test_a_message_that_the_peer_never_takes_is_an_error() -> None:
    class Dead(MemoryTransport):
        def send(self, tensor: torch.Tensor, peer: int) -> None:
            raise TransportError("the peer is gone")

    network = topology(Link(0.0, 1e9))
    transport = Shaper(network).wrap(Dead(0, 2, {}), ["d0", "d1"], 5.0)
    transport.send(torch.zeros(3), 1).wait(5.0)
    with pytest.raises(TransportError, match="gone"):
        transport.synchronize(5.0)
    with pytest.raises(TransportError, match="gone"):
        transport.send(torch.zeros(3), 1)
    transport.close()


def test_what_can_not_be_shaped_is_refused() -> None:
    (a, _) = memory_group(2)
    network = Topology((Device("d0", "n0", "x"), Device("d1", "n1", "y")), default_link=None)
    with pytest.raises(PlanError, match="no link from device d0 to device d1"):
        Shaper(network).wrap(a, ["d0", "d1"], 5.0)
    with pytest.raises(PlanError, match="device d7 is not in the topology"):
        Shaper(network).wrap(a, ["d0", "d7"], 5.0)


def test_it_says_that_it_is_simulated() -> None:
    assert "simulated" in repr(shaped(topology(Link(0.0, 1e9)))[0])


# ------------------------------------------------------------------ what was carried, and changes


def test_a_link_that_changes_does_so_for_what_is_on_its_way() -> None:
    def linked(rate: float, nic: float) -> Topology:
        return Topology(
            (Device("a", "na"), Device("b", "nb")),
            node_links={("na", "nb"): Link(0.1, rate)},
            node_uplinks={"na": Uplink(nic, nic)} if nic else {},
        )

    shaper = Shaper(linked(1e6, 0))
    link = shaper.path("a", "b")
    turns = link.leave(100_000, 0.0)
    assert next(turns) == pytest.approx(0.005)
    shaper.change(linked(1e5, 0))
    assert list(turns)[-1] == pytest.approx(0.005 + 0.95)
    shaper.change(linked(1e9, 1e4))
    assert list(link.leave(1000, 50.0))[-1] == pytest.approx(50.1), "a NIC that was no limit"
    assert shaper.traffic("a") == {"nb": link.traffic}
    assert shaper.traffic("b") == {}
