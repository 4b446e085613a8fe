from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from search_cases import job, problem, regions

from ray_train_geo.planning.baselines import (
    best_even_plan,
    even_plan,
    megatron_chains,
    random_chains,
)


def asked():
    return problem(regions([3, 2], gpus=2), job(batch=16, gradient_sync="sharded_ps"))


def test_megatron_puts_replicas_next_to_each_other():
    assert megatron_chains(asked(), 2) == ((0, 5), (1, 6), (2, 7), (3, 8), (4, 9))


def test_random_chains_use_each_device_once():
    chains = random_chains(asked(), 2, 7)
    assert sorted(d for chain in chains for d in chain) == list(range(10))
    assert chains == random_chains(asked(), 2, 7) != random_chains(asked(), 2, 8)


@settings(max_examples=10)
@given(st.integers(0, 1000), st.sampled_from([2, 3, 5]))
def test_the_best_of_many_is_the_fastest_in_the_engine(seed, stages):
    p = asked()
    placements = [random_chains(p, stages, seed + i) for i in range(8)]
    best = best_even_plan(p, placements)
    assert best.predicted_step_s == min(even_plan(p, c).predicted_step_s for c in placements)


def test_nothing_below_a_limit_is_missed():
    p = asked()
    placements = [random_chains(p, 2, seed) for seed in range(30)]
    best_s = best_even_plan(p, placements).predicted_step_s
    slow = best_even_plan(p, placements, below_s=best_s / 2).predicted_step_s
    assert slow >= best_s
    assert best_even_plan(p, placements, below_s=2 * best_s).predicted_step_s == best_s


def test_there_must_be_one():
    with pytest.raises(ValueError, match="no placements"):
        best_even_plan(asked(), [])
