"""Groups over several flows, between threads of this process: the sockets are real."""

from __future__ import annotations

import functools

import pytest
import torch
from at_once import each
from torch.distributed import HashStore

from ray_train_geo.errors import AbortedError, TransportError
from ray_train_geo.transport.gloo import GlooEndpoint, GlooTransport
from ray_train_geo.transport.striped import StripedTransport

FLOWS = 3


def ranks(size: int) -> list[tuple[list[GlooTransport], StripedTransport]]:
    """A connected group of ``size`` ranks, over three flows each."""
    store = HashStore()
    made: dict[int, tuple[list[GlooTransport], StripedTransport]] = {}

    def join(rank: int) -> None:
        endpoint = GlooEndpoint(store, "127.0.0.1", 20.0)
        flows = [endpoint.connect(f"flow{i}", rank, size) for i in range(FLOWS)]
        made[rank] = flows, StripedTransport(flows)

    each([functools.partial(join, rank) for rank in range(size)])
    return [made[rank] for rank in range(size)]


@pytest.mark.parametrize("elements", [5, 40_000, 100_003])
def test_messages_keep_their_order_and_every_byte(elements: int) -> None:
    (_, a), (_, b) = ranks(2)
    sent = [torch.randn(elements, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    received = [torch.zeros(elements) for _ in sent]
    posted = [b.recv(t, 0) for t in received]
    for pending in [*[a.send(t, 1) for t in sent], *posted]:
        pending.wait(5)
    assert all(torch.equal(s, r) for s, r in zip(sent, received, strict=True))


def test_a_long_message_goes_over_all_flows_and_a_short_one_over_one() -> None:
    (flows, a), (_, b) = ranks(2)
    for elements, used in ((16, 1), (10**5, FLOWS)):
        before = [len(flow._unfinished) for flow in flows]
        tensor = torch.ones(2, elements)
        pending = [b.recv(torch.zeros(2, elements), 0), a.send(tensor, 1)]
        assert sum(len(f._unfinished) > n for f, n in zip(flows, before, strict=True)) == used
        for operation in pending:
            operation.wait(5)
        a.synchronize(5)


def test_collectives_take_turns_and_sum_as_over_one_flow() -> None:
    group = [transport for _, transport in ranks(3)]
    buckets = [[torch.arange(9.0) * (r + b) for r in range(3)] for b in range(4)]
    for tensors in buckets:
        for op in [t.all_reduce(x) for t, x in zip(group, tensors, strict=True)]:
            op.wait(5)
    for b, tensors in enumerate(buckets):
        for tensor in tensors:
            torch.testing.assert_close(tensor, torch.arange(9.0) * (3 * b + 3))
    shards, parts = [3, 3, 3], [torch.ones(9) * (r + 1) for r in range(3)]
    for op in [t.reduce_scatter(x, shards) for t, x in zip(group, parts, strict=True)]:
        op.wait(5)
    for op in [t.all_gather(x, shards) for t, x in zip(group, parts, strict=True)]:
        op.wait(5)
    assert all(torch.equal(part, torch.full((9,), 6.0)) for part in parts)


def test_an_abort_releases_a_wait_on_every_flow() -> None:
    (_, a), (_, b) = ranks(2)
    waiting = b.recv(torch.zeros(10**5), 0)
    a.abort()
    with pytest.raises(TransportError):
        waiting.wait(5)
    with pytest.raises(AbortedError):
        a.send(torch.zeros(10**5), 1)
