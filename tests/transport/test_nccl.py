"""The NCCL transport: joining, moving bytes over a stand-in for CuPy, and, at the end, on a GPU."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nccl_stand_in import CODES, CPU, Device, Fabric, NcclError, group, on_device, soon, stand_in
from torch.distributed import HashStore, TCPStore

from ray_train_geo.errors import AbortedError, ClusterError, DeadlineError, TransportError
from ray_train_geo.transport.nccl import NcclTransport, nccl_available


@pytest.fixture
def fabric() -> Iterator[Fabric]:
    with stand_in() as made:
        yield made


# ---------------------------------------------------------------------- CuPy, or none


@pytest.fixture
def no_cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cupy", "cupy.cuda"):
        monkeypatch.setitem(sys.modules, name, None)


@pytest.mark.usefixtures("no_cupy")
def test_without_cupy_it_says_what_to_install() -> None:
    assert not nccl_available()
    with pytest.raises(ClusterError, match=r"needs CuPy.*install ray-train-geo\[gpu\]"):
        NcclTransport.connect(HashStore(), "test", 0, 1, CPU, 1.0)
    with pytest.raises(ClusterError, match="needs CuPy"):
        NcclTransport(0, 1, bytes(128), CPU, deadline_s=1.0)


def test_cupy_without_an_nccl_library(fabric: Fabric) -> None:
    assert nccl_available()
    vars(sys.modules["cupy.cuda.nccl"])["available"] = False
    assert not nccl_available()
    with pytest.raises(ClusterError, match=r"NCCL library.*ray-train-geo\[gpu\]"):
        NcclTransport(0, 1, bytes(128), CPU, deadline_s=1.0)


# ---------------------------------------------------------------------- joining


@pytest.mark.parametrize("form", [bytes, tuple])
@pytest.mark.parametrize("tcp", [False, True])
def test_all_ranks_get_the_unique_id_of_rank_0(fabric: Fabric, form: type, tcp: bool) -> None:
    fabric.form = form
    wait = timedelta(seconds=10)
    store = TCPStore("127.0.0.1", 0, 1, True, wait) if tcp else HashStore()
    transports = group(3, store)
    assert sorted(c.rank for c in fabric.made) == [0, 1, 2]
    assert len({c.id for c in fabric.made}) == 1
    assert fabric.ids == 1
    assert [t.rank for t in transports] == [0, 1, 2]


def test_groups_of_one_store_have_ids_of_their_own(fabric: Fabric) -> None:
    store = HashStore()
    for prefix in ("activations/0", "gradients/1"):
        NcclTransport.connect(store, prefix, 0, 1, CPU, 1.0)
    assert len({c.id for c in fabric.made}) == 2


def test_no_rank_0_within_the_deadline(fabric: Fabric) -> None:
    start = time.monotonic()
    with pytest.raises(DeadlineError, match="group test as rank 1 of 2: rank 0 published no"):
        NcclTransport.connect(HashStore(), "test", 1, 2, CPU, 0.1)
    assert time.monotonic() - start < 2


def test_a_rank_that_joins_too_late_finds_the_communicator_aborted(fabric: Fabric) -> None:
    unique_id = fabric.get_unique_id()
    start = time.monotonic()
    with pytest.raises(DeadlineError, match=r"joining group g \(rank 0 of 2\): not all ranks"):
        NcclTransport(0, 2, unique_id, CPU, deadline_s=0.1, name="g")
    assert time.monotonic() - start < 2
    NcclTransport(1, 2, unique_id, CPU, deadline_s=5)
    assert soon(lambda: len(fabric.made) == 2)
    given_up = next(c for c in fabric.made if c.rank == 0)
    assert soon(lambda: given_up.ended == ["abort"])


def test_what_nccl_refuses(fabric: Fabric) -> None:
    fabric.refusal = NcclError("NCCL_ERROR_INVALID_USAGE: invalid usage")
    with pytest.raises(TransportError, match=r"joining group test .*INVALID_USAGE") as caught:
        NcclTransport.connect(HashStore(), "test", 0, 1, CPU, 5.0)
    assert caught.value.__cause__ is fabric.refusal
    with pytest.raises(ValueError, match="rank 2 is not in a group of 2"):
        NcclTransport(2, 2, bytes(128), CPU, deadline_s=1)


# ---------------------------------------------------------------------- moving bytes


@pytest.mark.parametrize("dtype", CODES, ids=str)
def test_messages_of_a_pair_keep_their_order(fabric: Fabric, dtype: torch.dtype) -> None:
    a, b = group(2)
    sent = [on_device(torch.arange(i, i + 5).to(dtype)) for i in range(8)]
    received = [on_device(torch.zeros(5, dtype=dtype)) for _ in sent]
    posted = [b.recv(t, 0) for t in received]
    for pending in [*(a.send(t, 1) for t in sent), *posted]:
        pending.wait(5)
    assert all(torch.equal(s, r) for s, r in zip(sent, received, strict=True))


def test_receives_posted_ahead_do_not_block_in_a_circle(fabric: Fabric) -> None:
    """NCCL's receive blocks the host until its peer sends; both sides receive first."""
    there, back = group(2), group(2)
    first = on_device(torch.ones(3)), on_device(torch.zeros(3))
    second = on_device(torch.full((3,), 2.0)), on_device(torch.zeros(3))
    posted = there[1].recv(first[1], 0), back[0].recv(second[1], 1)
    there[0].send(first[0], 1).wait(5)
    back[1].send(second[0], 0).wait(5)
    for pending in posted:
        pending.wait(5)
    assert torch.equal(*first)
    assert torch.equal(*second)


def test_an_operation_runs_behind_the_current_stream_and_before_what_follows(
    fabric: Fabric,
) -> None:
    (only,) = group(1)
    operation: Any = only.all_reduce(on_device(torch.ones(2)))
    stream: Any = only.stream  # the stand-in's
    operation.wait(5)
    assert operation.ready.stream is fabric.current
    assert operation.ready in stream.waited_for
    assert operation.done.stream is only.stream
    assert operation.done in fabric.current.waited_for
    assert operation.tensors == ()


def test_exchange_with_the_peer_and_with_oneself(fabric: Fabric) -> None:
    pair = group(2)
    sent = [on_device(torch.full((4,), float(rank))) for rank in range(2)]
    received = [on_device(torch.empty(4)) for _ in range(2)]
    for pending in [pair[r].exchange(sent[r], received[r], 1 - r) for r in range(2)]:
        pending.wait(5)
    assert torch.equal(received[0], sent[1])
    assert torch.equal(received[1], sent[0])
    (only,) = group(1)
    only.exchange(sent[1], received[1], 0).wait(5)
    assert torch.equal(received[1], sent[1])


def test_all_reduce_in_place(fabric: Fabric) -> None:
    tensors = [on_device(torch.arange(6.0) * (rank + 1)) for rank in range(3)]
    for pending in [t.all_reduce(x) for t, x in zip(group(3), tensors, strict=True)]:
        pending.wait(5)
    for tensor in tensors:
        assert torch.equal(tensor, torch.arange(6.0) * 6)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=4))
@settings(max_examples=40, deadline=None)
def test_scatter_then_gather_is_the_sum_whatever_the_shards(shards: list[int]) -> None:
    with stand_in() as fabric:
        transports, elements = group(len(shards)), sum(shards)
        base = torch.arange(float(elements)) + 1
        tensors = [on_device(base * 10**rank) for rank in range(len(shards))]
        whole = base * sum(10**rank for rank in range(len(shards)))
        scattered = [t.reduce_scatter(x, shards) for t, x in zip(transports, tensors, strict=True)]
        for rank, pending in enumerate(scattered):
            pending.wait(5)
            start = sum(shards[:rank])
            mine = slice(start, start + shards[rank])
            assert torch.equal(tensors[rank][mine], whole[mine])
        for pending in [t.all_gather(x, shards) for t, x in zip(transports, tensors, strict=True)]:
            pending.wait(5)
        assert all(torch.equal(tensor, whole) for tensor in tensors)
        calls = [call for call in fabric.calls if call not in "()"]
        if len(set(shards)) == 1:
            assert calls == ["reduceScatter", "allGather"]
        else:
            roots = sum(count > 0 for count in shards)
            assert calls == ["reduce"] * roots + ["broadcast"] * roots
            assert fabric.calls.count("(") == 2 * len(shards)  # one group a rank and operation
        for transport in transports:
            transport.close()


def test_all_to_all_is_one_group_of_messages(fabric: Fabric) -> None:
    sizes = [[0, 2, 1], [3, 0, 1], [0, 2, 0]]  # from each, to each
    outgoing = [on_device(torch.arange(float(sum(r))) + 10 * i) for i, r in enumerate(sizes)]
    received = [[row[rank] for row in sizes] for rank in range(3)]
    incoming = [on_device(torch.zeros(sum(row))) for row in received]
    started = [
        t.all_to_all(outgoing[r], sizes[r], incoming[r], received[r])
        for r, t in enumerate(group(3))
    ]
    for pending in started:
        pending.wait(5)
    assert [t.tolist() for t in incoming] == [[10, 11, 12], [0, 1, 20, 21], [2, 13]]
    assert fabric.calls.count("(") == 3


class Elsewhere(Device):
    def get_device(self) -> int:
        return 3


def test_wrong_arguments_are_refused_and_change_nothing(fabric: Fabric) -> None:
    a, b = group(2)
    good = on_device(torch.ones(4))
    with pytest.raises(ValueError, match="rank 2 is not in group test of 2"):
        a.send(good, 2)
    with pytest.raises(ValueError, match="to itself by exchange"):
        a.recv(good, 0)
    with pytest.raises(ValueError, match="contiguous"):
        a.send(on_device(torch.ones(4, 4)).t(), 1)
    with pytest.raises(ValueError, match=r"tensor is on .*, transport on device -1"):
        a.send(torch.ones(4).as_subclass(Elsewhere), 1)
    with pytest.raises(ValueError, match="complex64"):
        a.all_reduce(on_device(torch.ones(4, dtype=torch.complex64)))
    for shards in ([4], [2, 1], [5, -1]):
        with pytest.raises(ValueError, match="don't cut"):
            a.reduce_scatter(good, shards)
    with pytest.raises(ValueError, match="flat"):
        b.all_gather(on_device(torch.ones(2, 2)), [2, 2])
    received = on_device(torch.zeros(4))
    posted = b.recv(received, 0)
    a.send(good, 1).wait(5)
    posted.wait(5)
    assert torch.equal(received, good)


# ---------------------------------------------------------------------- on a GPU


needs_nccl = pytest.mark.skipif(
    not (torch.cuda.is_available() and nccl_available()),
    reason="a test marked gpu: it wants a CUDA device, and CuPy with NCCL",
)


@pytest.fixture
def gpu() -> Iterator[NcclTransport]:
    """A communicator of one rank: all that one GPU can host."""
    device = torch.device("cuda", 0)
    transport = NcclTransport.connect(HashStore(), "gpu", 0, 1, device, 60.0)
    yield transport
    transport.close()
    torch.cuda.synchronize()


def sleep_on(stream: torch.cuda.Stream, seconds: float) -> None:
    """Keep ``stream`` busy; the clock of current GPUs is between 1 and 2 GHz."""
    with torch.cuda.stream(stream):
        torch.cuda._sleep(int(seconds * 2e9))


@pytest.mark.gpu
@needs_nccl
@pytest.mark.parametrize("dtype", CODES, ids=str)
def test_gpu_sends_to_itself_in_every_dtype(gpu: NcclTransport, dtype: torch.dtype) -> None:
    sent = torch.arange(100_000, device="cuda").remainder(100).to(dtype)
    received = torch.zeros_like(sent)
    for _ in range(3):
        gpu.exchange(sent, received, 0).wait(30)
    after = received.clone()  # on the current stream, which waits
    gpu.synchronize(30)
    assert torch.equal(after, sent)


@pytest.mark.gpu
@needs_nccl
def test_gpu_current_stream_waits_for_a_late_message(gpu: NcclTransport) -> None:
    sent, received = torch.ones(1000, device="cuda"), torch.zeros(1000, device="cuda")
    gpu.exchange(sent, received, 0).wait(30)
    gpu.synchronize(30)
    sleep_on(torch.cuda.current_stream(), 0.2)
    sent.fill_(7)  # the operation must wait for this
    sleep_on(gpu.stream, 0.2)
    start = time.monotonic()
    gpu.exchange(sent, received, 0).wait(30)
    assert time.monotonic() - start < 0.1  # the host does not
    assert received.clone().eq(7).all()


@pytest.mark.gpu
@needs_nccl
def test_gpu_collectives_of_one_rank_leave_the_tensor(gpu: NcclTransport) -> None:
    tensor = torch.randn(4096, device="cuda")
    before = tensor.clone()
    gpu.all_reduce(tensor).wait(30)
    gpu.reduce_scatter(tensor, [4096]).wait(30)
    gpu.all_gather(tensor, [4096]).wait(30)
    gpu.synchronize(30)
    assert torch.equal(tensor, before)


@pytest.mark.gpu
@needs_nccl
def test_gpu_synchronize_keeps_its_deadline(gpu: NcclTransport) -> None:
    tensor = torch.ones(8, device="cuda")
    sleep_on(gpu.stream, 1.0)
    gpu.all_reduce(tensor)
    start = time.monotonic()
    with pytest.raises(DeadlineError):
        gpu.synchronize(0.1)
    assert time.monotonic() - start < 0.4
    with pytest.raises(AbortedError):
        gpu.all_reduce(tensor)


@pytest.mark.gpu
@needs_nccl
def test_gpu_abort_from_another_thread_releases_a_waiter(gpu: NcclTransport) -> None:
    sent, received = torch.ones(8, device="cuda"), torch.zeros(8, device="cuda")
    gpu.exchange(sent, received, 0).wait(30)
    gpu.synchronize(30)
    sleep_on(gpu.stream, 1.0)
    gpu.exchange(sent, received, 0)
    aborted: list[float] = []

    def abort() -> None:
        time.sleep(0.1)
        aborted.append(time.monotonic())
        gpu.abort()

    thread = threading.Thread(target=abort)
    thread.start()
    with pytest.raises(AbortedError):
        gpu.synchronize(20)
    assert time.monotonic() - aborted[0] < 0.2
    thread.join()
    torch.cuda.synchronize()  # the GPU goes on, too
