"""Deadlines, errors and the end of an NCCL communicator, over a stand-in for CuPy."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from nccl_stand_in import Fabric, NcclError, group, on_device, soon, stand_in

from ray_train_geo.errors import AbortedError, DeadlineError, TransportError


@pytest.fixture
def fabric() -> Iterator[Fabric]:
    with stand_in() as made:
        yield made


def test_synchronize_waits_for_the_gpu_until_the_deadline_then_aborts(fabric: Fabric) -> None:
    (only,) = group(1)
    stream: Any = only.stream
    only.synchronize(1)
    pending = only.all_reduce(on_device(torch.ones(2)))
    only.synchronize(1)
    stream.busy = True
    pending.wait(1)  # the host does not wait for the stream
    with pytest.raises(DeadlineError, match=r"all-reduce in group test .*nothing came within 0.1"):
        only.synchronize(0.1)
    assert soon(lambda: fabric.made[0].ended == ["abort"])
    stream.busy = False  # NCCL's kernels leave the stream, without their bytes
    for again in (lambda: only.synchronize(1), lambda: pending.wait(1)):
        with pytest.raises(AbortedError, match="aborted after: all-reduce"):
            again()


def test_a_peer_that_never_makes_the_call_shows_in_wait_and_the_stuck_call_is_broken(
    fabric: Fabric,
) -> None:
    _, b = group(2)
    pending = b.recv(on_device(torch.zeros(2)), 0)
    with pytest.raises(DeadlineError, match=r"receiving from rank 0 .*did not join within 0.1"):
        pending.wait(0.1)
    communicator = next(c for c in fabric.made if c.rank == 1)
    assert soon(lambda: communicator.ended == ["abort"])
    with pytest.raises(AbortedError):
        b.recv(on_device(torch.zeros(2)), 0)


@pytest.mark.parametrize("busy", [False, True], ids=["in the call", "on the stream"])
def test_abort_from_another_thread_releases_a_waiter_at_once(fabric: Fabric, busy: bool) -> None:
    a, b = group(2)
    stream: Any = b.stream
    stream.busy = busy
    pending = b.recv(on_device(torch.zeros(2)), 0)
    if busy:
        a.send(on_device(torch.ones(2)), 1).wait(5)
        pending.wait(5)
    released: list[float] = []

    def wait() -> None:
        with pytest.raises(AbortedError, match="this side aborted it"):
            b.synchronize(10)
        released.append(time.monotonic())

    waiter = threading.Thread(target=wait)
    waiter.start()
    time.sleep(0.1)
    aborted = time.monotonic()
    b.abort()
    b.abort()
    waiter.join(5)
    assert released
    assert released[0] - aborted < 0.5
    communicator = next(c for c in fabric.made if c.rank == 1)
    assert soon(lambda: communicator.ended)
    b.close()
    time.sleep(0.15)
    assert communicator.ended == ["abort"]  # once


def test_an_error_that_nccl_finds_later_aborts(fabric: Fabric) -> None:
    (only,) = group(1)
    pending = only.all_reduce(on_device(torch.ones(2)))
    pending.wait(5)
    fabric.made[0].async_error = NcclError("NCCL_ERROR_REMOTE_ERROR: remote process exited")
    with pytest.raises(TransportError, match=r"all-reduce in .*REMOTE_ERROR") as caught:
        pending.wait(5)
    assert not isinstance(caught.value, DeadlineError | AbortedError)
    assert soon(lambda: fabric.made[0].ended == ["abort"])
    with pytest.raises(AbortedError, match="REMOTE_ERROR"):
        only.synchronize(1)


def test_a_call_that_fails_shows_in_its_wait_and_aborts(fabric: Fabric) -> None:
    (only,) = group(1)

    def fail(*args: Any) -> None:
        raise NcclError("NCCL_ERROR_SYSTEM_ERROR: unhandled system error\nand a stack")

    vars(fabric.made[0])["allReduce"] = fail
    pending = only.all_reduce(on_device(torch.ones(2)))
    assert soon(lambda: fabric.made[0].ended == ["abort"])
    with pytest.raises(TransportError, match=r"SYSTEM_ERROR: unhandled system error$"):
        pending.wait(5)
    with pytest.raises(AbortedError):
        only.all_reduce(on_device(torch.ones(2)))


def test_close_finishes_what_was_started_and_destroys(fabric: Fabric) -> None:
    a, b = group(2)
    sent, received = on_device(torch.ones(3)), on_device(torch.zeros(3))
    posted = b.recv(received, 0)
    a.send(sent, 1)
    for transport in (a, b):
        transport.close()
        transport.close()
    assert torch.equal(sent, received)
    assert soon(lambda: [c.ended for c in fabric.made] == [["destroy"]] * 2)
    posted.wait(1)
    for start in (lambda: a.send(sent, 1), lambda: b.all_reduce(received)):
        with pytest.raises(AbortedError, match="this side closed it"):
            start()


def test_close_does_not_wait_for_ever(fabric: Fabric) -> None:
    _, b = group(2, deadline_s=0.3)
    b.recv(on_device(torch.zeros(3)), 0)
    start = time.monotonic()
    b.close()
    assert time.monotonic() - start < 2
    communicator = next(c for c in fabric.made if c.rank == 1)
    assert soon(lambda: communicator.ended == ["abort"])
