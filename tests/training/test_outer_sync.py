"""Averaging pseudogradients: weighted by tokens, the same bits everywhere, few bytes sent."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from at_once import each
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed import HashStore

from ray_train_geo.planning.codecs import CodecName, wire_bytes
from ray_train_geo.planning.islands import Island
from ray_train_geo.spec_local_sgd import LocalSGDSpec
from ray_train_geo.training.outer_sync import Learned, OuterBucket, OuterSync
from ray_train_geo.training.rounds import due
from ray_train_geo.transport.base import Pending
from ray_train_geo.transport.gloo import GlooEndpoint, GlooTransport

HOLDERS = (0, 2, 3, 5)
AMONG = [Island((0, 1), (0, 1, 2), 3), Island((2,), (3,), 1), Island((3,), (4, 5), 4)]
BUCKETS = [OuterBucket(0, HOLDERS, ("a", "b"), (700, 301)), OuterBucket(1, HOLDERS, ("c",), (2,))]
TOKENS = {0: [3.0, 30.0], 1: [1.0, 0.0], 2: [4.0, 10.0]}
"""By island, of the first bucket."""


class Counting(GlooTransport):
    """Counts what it sends to other islands."""

    def send(self, tensor: torch.Tensor, peer: int) -> Pending:
        if {peer, self.rank} != {0, 1}:
            self.sent_bytes = getattr(self, "sent_bytes", 0) + tensor.nbytes
        return super().send(tensor, peer)


def island_of(rank: int) -> int:
    return next(i for i, island in enumerate(AMONG) if rank in island.ranks)


def pseudogradients(island: int) -> list[torch.Tensor]:
    noise = torch.Generator().manual_seed(island)
    return [torch.randn(sum(b.sizes), generator=noise) for b in BUCKETS]


def averaged(codec: CodecName) -> dict[int, tuple[list[torch.Tensor], int]]:
    """By rank: the means of both buckets, and the bytes sent to other islands."""
    store = HashStore()

    def work(rank: int) -> tuple[list[torch.Tensor], int]:
        endpoint = GlooEndpoint(store, "127.0.0.1", 20.0)
        transport = endpoint.connect("merge", HOLDERS.index(rank), len(HOLDERS))
        transport.__class__ = Counting
        sync = OuterSync(rank, AMONG, {HOLDERS: transport}, codec, 20.0)
        island = island_of(rank)
        tokens = [torch.tensor(TOKENS[island]), torch.zeros(1)]
        learned = [
            Learned(bucket, g, t.double(), f"{i}")
            for i, (bucket, g, t) in enumerate(
                zip(BUCKETS, pseudogradients(island), tokens, strict=True)
            )
        ]
        means = sync.start(learned).result(20.0)
        sync.close()
        return means, getattr(transport, "sent_bytes", 0)

    results = each([functools.partial(work, rank) for rank in HOLDERS])
    return dict(zip(HOLDERS, results, strict=True))


def expected() -> list[torch.Tensor]:
    whole = torch.stack([pseudogradients(i)[0] for i in range(3)])
    tokens = torch.tensor([TOKENS[i] for i in range(3)])
    shares = (tokens / tokens.sum(0)).repeat_interleave(torch.tensor([700, 301]), 1)
    return [(whole * shares).sum(0), torch.zeros(2)]


@pytest.mark.parametrize(
    ("codec", "error"), [("none", 1e-6), ("bf16", 0.02), ("int8", 0.1), ("int4", 1.2)]
)
def test_the_mean_is_weighted_by_tokens_and_the_same_everywhere(
    codec: CodecName, error: float
) -> None:
    results = averaged(codec)
    for mean, wanted, same in zip(results[0][0], expected(), results[3][0], strict=True):
        torch.testing.assert_close(mean, wanted, rtol=0, atol=error)
        assert torch.equal(mean, same)
    for rank in HOLDERS:
        for mean, same in zip(results[rank][0], results[0][0], strict=True):
            assert torch.equal(mean, same), "replicas must not drift"
    # Each island sends two shards out, and the mean of its own to the two others.
    assert results[2][1] == 0, "only the first holder of an island talks to others"
    header = 8 * (2 + 1)

    parts = [(334, 1), (334, 1), (333, 0)]
    for shard, rank in enumerate((0, 3, 5)):
        away = [wire_bytes(codec, n, "fp32") for k in range(3) if k != shard for n in parts[k]]
        own = sum(wire_bytes(codec, n, "fp32") for n in parts[shard])
        assert results[rank][1] == sum(away) + 2 * own + 2 * header


def test_one_island_has_nobody_to_agree_with() -> None:
    bucket = OuterBucket(0, (0,), ("a",), (5,))
    sync = OuterSync(0, [Island((0,), (0,), 1)], {}, "int4", 1.0)
    learned = Learned(bucket, torch.arange(5.0), torch.ones(1).double(), "")
    assert torch.equal(sync.start([learned]).result(1.0)[0], torch.arange(5.0))
    sync.close()


@given(st.data())
def test_every_fragment_has_its_turn_once_a_round(data: st.DataObject) -> None:
    inner = data.draw(st.integers(1, 40))
    fragments = data.draw(st.integers(1, inner))
    spec = LocalSGDSpec(inner_steps=inner, fragments=fragments)
    turns = [(step, f) for step in range(1, 3 * inner + 1) for f in due(step, spec)]
    for f in range(fragments):
        own = [step for step, g in turns if g == f]
        assert len(own) == 3
        assert all(b - a == inner for a, b in itertools.pairwise(own))
    assert (inner, fragments - 1) in turns, "a round ends at a multiple of inner_steps"
    gaps = {b - a for (a, _), (b, _) in itertools.pairwise(turns)}
    assert max(gaps, default=0) - min(gaps, default=0) <= 1, "evenly spread"
