"""Gradient sync: sums over all holders in every mode, started in order as backward goes on."""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import get_args

import pytest
import torch
from torch.distributed import HashStore

from ray_train_geo.observe.trace import Tracer
from ray_train_geo.planning.sync_routes import route_of
from ray_train_geo.spec import GradientSyncName
from ray_train_geo.training.buckets import Bucket
from ray_train_geo.training.exact_sums import ExactSums
from ray_train_geo.training.gradient_sync import GradientSync
from ray_train_geo.transport.base import Pending, Transport
from ray_train_geo.transport.gloo import GlooEndpoint

MODES = get_args(GradientSyncName)


def sync_of(
    mode: GradientSyncName,
    buckets: Sequence[Bucket],
    buffers: Mapping[int, torch.Tensor],
    transports: Mapping[tuple[int, ...], Transport],
    sites: Sequence[str],
) -> GradientSync:
    """The exact sync of a rank; every rank of ``sites`` is in one of them."""
    routes = {
        ranks: route_of(mode, [sites[rank] for rank in ranks])
        for ranks in transports
        if mode != "allreduce"
    }
    sums = ExactSums(buckets, buffers, transports, mode, routes)
    return GradientSync(buckets, transports, sums, Tracer(enabled=False))


class Log:
    """A transport that only writes down what is started and what is waited for."""

    def __init__(self, log: list[str], name: str, size: int) -> None:
        self.log, self.name, self.rank, self.size = log, name, 0, size

    def _start(self, what: str) -> Pending:
        self.log.append(f"{what} {self.name}")
        return Waits(self.log, f"wait {what} {self.name}")

    def send(self, tensor: torch.Tensor, peer: int) -> Pending:
        raise AssertionError("gradient sync uses collectives only")

    recv = send

    def all_reduce(self, tensor: torch.Tensor) -> Pending:
        return self._start(f"sum {tensor.numel()}")

    def reduce_scatter(self, tensor: torch.Tensor, shards: Sequence[int]) -> Pending:
        return self._start(f"scatter {list(shards)}")

    def all_gather(self, tensor: torch.Tensor, shards: Sequence[int]) -> Pending:
        return self._start(f"gather {list(shards)}")

    def synchronize(self, timeout_s: float) -> None: ...

    def abort(self) -> None: ...

    def close(self) -> None: ...


class Waits:
    def __init__(self, log: list[str], what: str) -> None:
        self._log, self._what = log, what

    def wait(self, timeout_s: float) -> None:
        self._log.append(self._what)


def logged(mode: GradientSyncName) -> tuple[GradientSync, list[str]]:
    """Rank 0 with buckets of 5, 3 and 4 elements, the second of which nobody shares."""
    log: list[str] = []
    buckets = [Bucket((0, 2), ("c",)), Bucket((0,), ("b",)), Bucket((0, 3, 5), ("a",))]
    buffers = {i: torch.zeros(n) for i, n in enumerate((5, 3, 4))}
    transports = {(0, 2): Log(log, "x", 2), (0, 3, 5): Log(log, "y", 3)}
    sync = sync_of(mode, buckets, buffers, transports, "aaaaaa")
    sync.begin(1)
    return sync, log


def test_a_bucket_waits_for_its_turn() -> None:
    sync, log = logged("allreduce")
    sync.ready(2)
    sync.ready(1)
    assert log == [], "the first bucket must start first, on every rank"
    sync.ready(0)
    assert log == ["sum 5 x", "sum 4 y"], "at once, and not for what nobody shares"
    sync.finish(5.0)
    assert log[2:] == ["wait sum 5 x", "wait sum 4 y"]


def test_a_bucket_starts_while_backward_goes_on() -> None:
    sync, log = logged("allreduce")
    sync.ready(0)
    assert log == ["sum 5 x"]


@pytest.mark.parametrize(
    ("mode", "x", "y"),
    [("sharded_ps", [3, 2], [2, 1, 1]), ("central_ps", [5, 0], [4, 0, 0])],
)
def test_who_sums_which_shard(mode: GradientSyncName, x: list[int], y: list[int]) -> None:
    sync, log = logged(mode)
    for bucket in range(3):
        sync.ready(bucket)
    sync.finish(5.0)
    assert log == [
        f"scatter {x} x",
        f"scatter {y} y",
        f"wait scatter {x} x",
        f"gather {x} x",
        f"wait scatter {y} y",
        f"gather {y} y",
        f"wait gather {x} x",
        f"wait gather {y} y",
    ]


def test_an_unfinished_backward_is_not_applied() -> None:
    sync, _ = logged("allreduce")
    sync.ready(0)
    with pytest.raises(RuntimeError, match="bucket 2 never became ready"):
        sync.finish(5.0)


def test_a_new_step_forgets_the_last_ones_arrivals() -> None:
    sync, log = logged("allreduce")
    for bucket in range(3):
        sync.ready(bucket)
    sync.finish(5.0)
    sync.begin(2)
    sync.ready(1)
    assert len(log) == 4, "nothing of the new step has started"


def together(calls: Sequence[Callable[[], None]]) -> None:
    threads = [threading.Thread(target=call) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@pytest.mark.parametrize("mode", MODES)
def test_sums_over_overlapping_groups_on_real_sockets(mode: GradientSyncName) -> None:
    """Ranks 0, 1, 2 share a bucket; 0, 1 and 1, 2 share one each; 2 has one alone."""
    store = HashStore()
    shared = [Bucket((0, 1, 2), ("c",)), Bucket((0, 1), ("b",)), Bucket((1, 2), ("a",))]
    alone = Bucket((2,), ("z",))
    elements = {"c": 7, "b": 5, "a": 1, "z": 2}
    mine = [[b for b in (*shared, alone) if rank in b.holders] for rank in range(3)]
    buffers = [
        {i: torch.arange(float(elements[b.names[0]])) + 10**rank for i, b in enumerate(row)}
        for rank, row in enumerate(mine)
    ]
    before = [{i: t.clone() for i, t in row.items()} for row in buffers]

    def work(rank: int) -> None:
        endpoint = GlooEndpoint(store, "127.0.0.1", 20.0)
        joined: dict[tuple[int, ...], Transport] = {}
        for bucket in shared:
            if rank in bucket.holders:
                joined[bucket.holders] = endpoint.connect(
                    f"sync{bucket.holders}", bucket.holders.index(rank), len(bucket.holders)
                )
        sync = sync_of(mode, mine[rank], buffers[rank], joined, "aba")
        sync.begin(1)
        for index in reversed(range(len(mine[rank]))):  # completed in any order
            sync.ready(index)
        sync.finish(20.0)
        for transport in joined.values():
            transport.close()

    together([functools.partial(work, rank) for rank in range(3)])
    for rank, i in itertools.product(range(3), range(3)):
        if i < len(mine[rank]):
            bucket = mine[rank][i]
            parts = [before[r][mine[r].index(bucket)] for r in bucket.holders]
            expected = torch.stack(parts).sum(0)
            assert torch.equal(buffers[rank][i], expected), (rank, bucket)
