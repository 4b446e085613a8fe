"""AdamW's groups and state, and the learning rate as a function of the step."""

from __future__ import annotations

import copy
import itertools
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ray_train_geo.spec import TrainingSpec
from ray_train_geo.training.optimizer import MOMENTS, AdamW, learning_rate


def spec(**fields: Any) -> TrainingSpec:
    return TrainingSpec(**{"steps": 100, "global_batch": 1, "seq_len": 1, "lr": 1.0, **fields})


def test_warmup_is_linear_and_ends_at_the_peak() -> None:
    training = spec(warmup_steps=4)
    assert [learning_rate(s, training) for s in (1, 2, 3, 4)] == [0.25, 0.5, 0.75, 1.0]


def test_cosine_ends_at_min_lr_and_stays_there() -> None:
    training = spec(warmup_steps=10, min_lr=0.1, lr_decay_steps=50)
    assert learning_rate(30, training) == pytest.approx(0.55)  # half way: the mean of the ends
    assert learning_rate(50, training) == pytest.approx(0.1)
    assert learning_rate(90, training) == pytest.approx(0.1)


def test_constant_stays_at_the_peak() -> None:
    training = spec(lr_schedule="constant", warmup_steps=2)
    assert {learning_rate(s, training) for s in range(2, 101)} == {1.0}


@given(st.integers(0, 120), st.one_of(st.none(), st.integers(1, 200)), st.floats(0, 1, width=32))
def test_never_outside_its_ends_and_falls_after_warmup(
    warmup: int, decay: int | None, min_lr: float
) -> None:
    training = spec(warmup_steps=warmup, lr_decay_steps=decay, min_lr=min_lr)
    rates = [learning_rate(s, training) for s in range(1, 101)]
    assert all(0 <= r <= 1 + 1e-9 for r in rates)
    after = rates[warmup:]
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(after))
    assert all(r >= min_lr - 1e-9 for r in after)


def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "matrix": torch.randn(3, 4, generator=generator),
        "bias": torch.randn(4, generator=generator),
    }


def test_matrices_decay_and_vectors_do_not() -> None:
    mine, training = weights(), spec(lr=0.1, weight_decay=0.5)
    optimizer = AdamW(mine, training)
    before = copy.deepcopy(mine)
    for weight in mine.values():
        weight.grad = torch.zeros_like(weight)
    optimizer.step(0.1)
    torch.testing.assert_close(mine["matrix"], before["matrix"] * (1 - 0.1 * 0.5))
    assert torch.equal(mine["bias"], before["bias"])


def test_the_update_is_torchs() -> None:
    mine, theirs, training = weights(), weights(), spec(lr=0.01, weight_decay=0.0)
    ours = AdamW(mine, training)
    plain = torch.optim.AdamW(
        theirs.values(), lr=0.01, betas=training.betas, eps=training.eps, weight_decay=0.0
    )
    for step in range(5):
        for name in mine:
            gradient = torch.full_like(mine[name], 0.1 * step - 0.2)
            mine[name].grad, theirs[name].grad = 8 * gradient, gradient.clone()
        ours.step(0.01, factor=1 / 8)
        plain.step()
    for name in mine:
        torch.testing.assert_close(mine[name], theirs[name], rtol=1e-6, atol=1e-7)


def test_state_is_there_before_the_first_step() -> None:
    mine = weights()
    optimizer = AdamW(mine, spec())
    assert optimizer.updates == 0
    assert set(optimizer.moments) == set(MOMENTS)
    for moments in optimizer.moments.values():
        assert {n: m.shape for n, m in moments.items()} == {n: w.shape for n, w in mine.items()}
        assert all(not moment.any() for moment in moments.values())
    optimizer.updates = 7
    assert optimizer.updates == 7
    for weight in mine.values():
        weight.grad = torch.ones_like(weight)
    optimizer.step(0.1)
    assert optimizer.updates == 8


def test_a_weight_without_a_gradient_stays() -> None:
    mine = weights()
    optimizer, before = AdamW(mine, spec()), copy.deepcopy(mine)
    mine["bias"].grad = torch.ones_like(mine["bias"])
    optimizer.step(0.1)
    assert torch.equal(mine["matrix"], before["matrix"])
    assert not torch.equal(mine["bias"], before["bias"])


def test_a_step_needs_nothing_of_torchs_compiler() -> None:
    code = """
import sys, torch
from ray_train_geo.spec import TrainingSpec
from ray_train_geo.training.optimizer import AdamW
weight = torch.ones(2, 2)
weight.grad = torch.ones(2, 2)
AdamW({"w": weight}, TrainingSpec(steps=1, global_batch=1, seq_len=1)).step(0.1)
assert "torch._dynamo" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
