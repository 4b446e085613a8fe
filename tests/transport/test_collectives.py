"""Collectives made of messages, over queues."""

from __future__ import annotations

import itertools
from functools import partial

import torch
from at_once import each
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_group import memory_group

from ray_train_geo.transport import collectives

sizes = st.integers(1, 5)


def filled(size: int, elements: int) -> list[torch.Tensor]:
    return [
        torch.randn(elements, generator=torch.Generator().manual_seed(rank)) for rank in range(size)
    ]


@settings(max_examples=25, deadline=None)
@given(size=sizes, elements=st.integers(1, 40))
def test_a_ring_gives_every_rank_the_same_bits(size: int, elements: int) -> None:
    group, tensors = memory_group(size), filled(size, elements)
    expected = torch.stack(tensors).sum(0)
    each(
        [
            partial(collectives.ring_all_reduce, transport, tensor, 5.0)
            for transport, tensor in zip(group, tensors, strict=True)
        ]
    )
    torch.testing.assert_close(tensors[0], expected)
    assert all(torch.equal(tensors[0], t) for t in tensors)


@settings(max_examples=25, deadline=None)
@given(data=st.data(), size=sizes)
def test_scatter_and_gather_are_a_sum(data: st.DataObject, size: int) -> None:
    shards = data.draw(st.lists(st.integers(0, 9), min_size=size, max_size=size))
    group, tensors = memory_group(size), filled(size, sum(shards))
    expected = torch.stack(tensors).sum(0)
    for operation in (collectives.reduce_scatter, collectives.all_gather):
        started = [operation(g, t, shards) for g, t in zip(group, tensors, strict=True)]
        for pending in started:
            pending.wait(5.0)
            pending.wait(5.0)  # what is done is not done twice
    torch.testing.assert_close(tensors[0], expected)
    assert all(torch.equal(tensors[0], t) for t in tensors)


@settings(max_examples=25, deadline=None)
@given(data=st.data(), size=sizes)
def test_everybody_gets_its_part_from_everybody(data: st.DataObject, size: int) -> None:
    counts = [[data.draw(st.integers(0, 4)) for _ in range(size)] for _ in range(size)]
    received = [[counts[p][rank] for p in range(size)] for rank in range(size)]
    outgoing = [torch.arange(float(sum(row))) + 100 * rank for rank, row in enumerate(counts)]
    incoming = [torch.full((sum(row),), -1.0) for row in received]
    started = [
        collectives.all_to_all(g, outgoing[r], counts[r], incoming[r], received[r])
        for r, g in enumerate(memory_group(size))
    ]
    for pending in started:
        pending.wait(5.0)
    for rank, peer in itertools.product(range(size), range(size)):
        got = incoming[rank].split(received[rank])[peer]
        sent = outgoing[peer].split(counts[peer])[rank]
        assert torch.equal(got, torch.full_like(sent, -1.0) if peer == rank else sent)
