"""The gloo transport, between threads of this process: the sockets are real."""

from __future__ import annotations

import functools
import threading
import time

import pytest
import torch
from at_once import each
from torch.distributed import HashStore

from ray_train_geo.errors import AbortedError, DeadlineError, TransportError
from ray_train_geo.transport.gloo import GlooEndpoint, GlooTransport


def ranks(size: int, deadline_s: float = 20.0) -> list[tuple[GlooEndpoint, GlooTransport]]:
    """A connected group of ``size`` ranks."""
    store = HashStore()
    made: dict[int, tuple[GlooEndpoint, GlooTransport]] = {}

    def join(rank: int) -> None:
        endpoint = GlooEndpoint(store, "127.0.0.1", deadline_s)
        made[rank] = endpoint, endpoint.connect("test", rank, size)

    each([functools.partial(join, rank) for rank in range(size)])
    return [made[rank] for rank in range(size)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64])
def test_messages_of_a_pair_keep_their_order(dtype: torch.dtype) -> None:
    (_, a), (_, b) = ranks(2)
    sent = [torch.arange(i, i + 5).to(dtype) for i in range(8)]
    received = [torch.zeros(5, dtype=dtype) for _ in range(8)]
    posted = [b.recv(t, 0) for t in received]
    for pending in [a.send(t, 1) for t in sent]:
        pending.wait(5)
    for pending in posted:
        pending.wait(5)
    assert all(torch.equal(s, r) for s, r in zip(sent, received, strict=True))


@pytest.mark.parametrize("size", [2, 3, 4])
def test_all_reduce_gives_every_rank_the_same_bits(size: int) -> None:
    group = [transport for _, transport in ranks(size)]
    tensors = [torch.randn(10_001, generator=torch.Generator().manual_seed(r)) for r in range(size)]
    expected = torch.stack(tensors).sum(0)
    for pending in [t.all_reduce(x) for t, x in zip(group, tensors, strict=True)]:
        pending.wait(5)
    torch.testing.assert_close(tensors[0], expected)
    assert all(torch.equal(tensors[0], t) for t in tensors)


@pytest.mark.parametrize("shards", [[4, 3, 3], [10, 0, 0], [0, 1, 9]])
def test_reduce_scatter_then_all_gather_is_a_sum(shards: list[int]) -> None:
    group = [transport for _, transport in ranks(3)]
    tensors = [torch.arange(10.0) * (r + 1) for r in range(3)]
    scattered = [t.reduce_scatter(x, shards) for t, x in zip(group, tensors, strict=True)]
    for pending in scattered:
        pending.wait(5)
    gathered = [t.all_gather(x, shards) for t, x in zip(group, tensors, strict=True)]
    for pending in gathered:
        pending.wait(5)
    for tensor in tensors:
        torch.testing.assert_close(tensor, torch.arange(10.0) * 6)


def test_all_to_all() -> None:
    group = [transport for _, transport in ranks(3)]
    sizes = [[0, 2, 1], [3, 0, 1], [0, 2, 0]]  # from each, to each
    outgoing = [torch.arange(sum(row), dtype=torch.uint8) + 10 * r for r, row in enumerate(sizes)]
    received = [[row[rank] for row in sizes] for rank in range(3)]
    incoming = [torch.zeros(sum(row), dtype=torch.uint8) for row in received]
    for pending in [
        t.all_to_all(outgoing[r], sizes[r], incoming[r], received[r]) for r, t in enumerate(group)
    ]:
        pending.wait(5)
    assert [t.tolist() for t in incoming] == [[10, 11, 12], [0, 1, 20, 21], [2, 13]]


def test_a_silent_peer_is_an_error_at_the_deadline() -> None:
    (_, a), (_, _b) = ranks(2)
    start = time.monotonic()
    with pytest.raises(DeadlineError, match=r"receiving from rank 1.*0\.3 s"):
        a.recv(torch.zeros(3), 1).wait(0.3)
    assert time.monotonic() - start < 2


def test_an_abort_releases_who_waits_for_a_member_that_never_joins() -> None:
    endpoint = GlooEndpoint(HashStore(), "127.0.0.1", deadline_s=5.0)
    threading.Timer(0.2, endpoint.abort).start()
    start = time.monotonic()
    with pytest.raises(AbortedError, match="joining group lonely as rank 0 of 2"):
        endpoint.connect("lonely", 0, 2)
    assert time.monotonic() - start < 2


def test_a_member_that_never_joins_is_an_error_at_the_deadline() -> None:
    endpoint = GlooEndpoint(HashStore(), "127.0.0.1", deadline_s=0.3)
    with pytest.raises(DeadlineError, match="joining group lonely as rank 0 of 2"):
        endpoint.connect("lonely", 0, 2)


def test_abort_releases_waits_here_and_at_the_peers() -> None:
    group = ranks(3)
    released: dict[int, tuple[float, type[BaseException]]] = {}

    def blocked(rank: int) -> None:
        try:
            group[rank][1].recv(torch.zeros(3), (rank + 1) % 3).wait(20)
        except TransportError as e:
            released[rank] = time.monotonic(), type(e)

    threads = [threading.Thread(target=blocked, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    time.sleep(0.3)
    start = time.monotonic()
    group[0][0].abort()
    for thread in threads:
        thread.join(5)
    # Rank 0's sockets ended both of its neighbours' waits; nothing waited for its deadline.
    assert sorted(released) == [0, 1, 2]
    assert all(when - start < 2 for when, _ in released.values())
    assert released[0][1] is AbortedError
    with pytest.raises(AbortedError):
        group[0][1].send(torch.zeros(3), 1)


def test_abort_leaves_foreign_sockets_alone() -> None:
    import socket

    (endpoint, _), _other = ranks(2)
    ours, theirs = socket.socketpair()
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = socket.create_connection(server.getsockname())
        accepted, _ = server.accept()
        endpoint.abort()
        for left, right in ((ours, theirs), (client, accepted)):
            left.sendall(b"still here")
            assert right.recv(10) == b"still here"
            left.close()
            right.close()
