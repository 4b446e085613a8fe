"""The sums that end a step, over real gloo between threads."""

from __future__ import annotations

import threading
import time

import pytest
from torch.distributed import HashStore

from ray_train_geo.errors import TransportError
from ray_train_geo.training.commit import Commit
from ray_train_geo.transport.gloo import GlooEndpoint


def on_each_rank(size: int, work) -> list:
    """``work(commit, rank)`` on every rank of a world of ``size``; what each returned."""
    store, found = HashStore(), {}

    def run(rank: int) -> None:
        transport = GlooEndpoint(store, "127.0.0.1", 20.0).connect("world", rank, size)
        try:
            found[rank] = work(Commit(transport, 3), rank)
        except BaseException as e:
            found[rank] = e
        time.sleep(0.05)  # a peer may still be receiving
        transport.close()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[rank] for rank in range(size)]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_everyone_gets_the_same_sums_step_after_step(size: int) -> None:
    def work(commit: Commit, rank: int) -> list[list[float]]:
        totals = []
        for step in range(3):
            commit.begin()
            totals.append(commit.agree([0.1 * (rank + step), 2.0**rank, rank == 1], 5.0))
        return totals

    results = on_each_rank(size, work)
    assert all(r == results[0] for r in results), "the same bits"
    for step, total in enumerate(results[0]):
        assert total[0] == pytest.approx(sum(0.1 * (rank + step) for rank in range(size)))
        assert total[1:] == [2.0**size - 1, size > 1]


def test_nobody_commits_without_all() -> None:
    def work(commit: Commit, rank: int) -> list[float] | None:
        commit.begin()
        return None if rank == 2 else commit.agree([1.0, 1.0, 0.0], 0.3)

    results = on_each_rank(3, work)
    assert results[2] is None
    assert all(isinstance(r, TransportError) for r in results[:2])
