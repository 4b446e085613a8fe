"""Buckets: whatever the stage boundaries, holders agree on what they sum, and in which order."""

from __future__ import annotations

import graphlib
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_train_geo.model.catalog import CATALOG, ModelDims, parameter_shapes
from ray_train_geo.model.stage import build_stage
from ray_train_geo.planning.plan import PipelinePlan, Plan, StagePlan
from ray_train_geo.training.buckets import Bucket, depth, holders_of, make_buckets


def dims_of(family: str, layers: int, tied: bool) -> ModelDims:
    return ModelDims(
        family="llama" if family == "llama" else "gpt",
        layers=layers,
        dim=8,
        heads=2,
        kv_heads=2,
        ffn_dim=16,
        vocab_size=11,
        max_seq_len=4,
        tied_embeddings=tied,
    )


def plan_of(*boundaries: list[int]) -> Plan:
    pipelines = tuple(
        PipelinePlan(
            tuple(
                StagePlan(f"d{p}.{s}", pair, 0) for s, pair in enumerate(itertools.pairwise(bounds))
            ),
            microbatches=1,
            first_microbatch=p,
        )
        for p, bounds in enumerate(boundaries)
    )
    return Plan(boundaries[0][-1], pipelines, "1f1b", "allreduce", (), 0.0)


def sizes_of(plan: Plan, dims: ModelDims, rank: int) -> dict[str, int]:
    role = next(r for r in plan.roles() if r.rank == rank)
    first, last = plan.stage(role).layers
    module = build_stage(dims, first, last, seed=0, device="meta")
    return {name: p.numel() for name, p in module.named_parameters()}


def buckets_of(plan: Plan, dims: ModelDims, bucket_bytes: int) -> list[list[Bucket]]:
    """Each rank's buckets, as each rank works them out for itself."""
    return [
        make_buckets(sizes_of(plan, dims, rank), plan, dims, bucket_bytes)
        for rank in range(plan.world_size)
    ]


@st.composite
def boundaries(draw: st.DrawFn) -> list[list[int]]:
    layers = draw(st.integers(1, 6))
    inner = st.sets(st.integers(1, layers - 1)) if layers > 1 else st.just(set[int]())
    cuts = draw(st.lists(inner, min_size=1, max_size=4))
    return [[0, *sorted(cut), layers] for cut in cuts]


@settings(max_examples=60, deadline=None)
@given(
    boundaries(), st.sampled_from(["gpt", "llama"]), st.booleans(), st.sampled_from([1, 600, 4000])
)
def test_any_plan(bounds: list[list[int]], family: str, tied: bool, bucket_bytes: int) -> None:
    plan, dims = plan_of(*bounds), dims_of(family, bounds[0][-1], tied)
    made = buckets_of(plan, dims, bucket_bytes)
    order: graphlib.TopologicalSorter[Bucket] = graphlib.TopologicalSorter()
    for rank, buckets in enumerate(made):
        sizes = sizes_of(plan, dims, rank)
        names = [name for bucket in buckets for name in bucket.names]
        assert sorted(names) == sorted(sizes), "each weight once"
        for bucket in buckets:
            assert rank in bucket.holders
            for holder in bucket.holders:
                assert bucket in made[holder], "all holders have the same bucket"
            elements = sum(sizes[name] for name in bucket.names)
            assert 4 * elements <= bucket_bytes or len(bucket.names) == 1
        for earlier, later in itertools.pairwise(buckets):
            order.add(later, earlier)
    order.prepare()  # raises CycleError if two ranks could wait for each other


@settings(max_examples=60, deadline=None)
@given(boundaries(), st.booleans())
def test_holders_are_the_ranks_whose_stage_has_the_weight(
    bounds: list[list[int]], tied: bool
) -> None:
    plan, dims = plan_of(*bounds), dims_of("gpt", bounds[0][-1], tied)
    sizes = [sizes_of(plan, dims, rank) for rank in range(plan.world_size)]
    for name in parameter_shapes(dims):
        expected = tuple(rank for rank, mine in enumerate(sizes) if name in mine)
        found = holders_of(name, plan, dims)
        assert tuple(sorted(found)) == expected
        assert (tied and name == "tokens.weight") or found == expected


def test_the_picture_of_the_module_docstring() -> None:
    plan, dims = plan_of([0, 3, 4], [0, 2, 4]), dims_of("gpt", 4, tied=False)
    assert [holders_of(f"layers.{i}.qkv.weight", plan, dims) for i in range(4)] == [
        (0, 2),
        (0, 2),
        (0, 3),
        (1, 3),
    ]
    whole = buckets_of(plan, dims, 2**30)
    assert [b.holders for b in whole[0]] == [(0, 3), (0, 2)]
    assert [b.holders for b in whole[3]] == [(1, 3), (0, 3)]


def test_backward_finishes_the_deepest_first() -> None:
    dims = dims_of("gpt", 3, tied=False)
    names = sorted(parameter_shapes(dims), key=lambda n: -depth(n, dims))
    heads = [name.split(".")[0] for name in names]
    assert [key for key, _ in itertools.groupby(heads)] == [
        "output",
        "norm",
        "layers",
        "positions",
        "tokens",
    ]
    layers = [int(name.split(".")[1]) for name in names if name.startswith("layers")]
    assert layers == sorted(layers, reverse=True)


def test_a_tied_matrix_is_summed_over_both_ends() -> None:
    plan = plan_of([0, 1, 2, 3], [0, 3])
    assert holders_of("tokens.weight", plan, dims_of("gpt", 3, tied=True)) == (0, 3, 2)
    assert holders_of("tokens.weight", plan, dims_of("gpt", 3, tied=False)) == (0, 3)


def test_an_unknown_weight_is_refused() -> None:
    with pytest.raises(KeyError, match="lm_head"):
        depth("lm_head.weight", CATALOG["gpt2"])
