"""The checks of a chaos run see what they are there to see."""

from __future__ import annotations

from typing import Any

import pytest

from ray_train_geo.chaos.verify import check_losses, check_lost_steps, check_samples, check_steps
from ray_train_geo.data.order import SampleOrder


def records(steps: list[int]) -> list[dict[str, Any]]:
    return [{"step": step, "loss": 5.0 / step} for step in steps]


@pytest.mark.parametrize(
    ("steps", "passed", "says"),
    [
        ([1, 2, 3], True, "each of 3 once"),
        ([1, 2, 2, 3], False, "1 of 3 steps are wrong: 2 (2 times)"),
        ([1, 3], False, "2 (0 times)"),
        ([1, 2, 3, 4], False, "4 (1 times)"),
        ([2, 1, 3], False, "not in order"),
        ([], False, "3 of 3 steps"),
    ],
)
def test_each_step_once(steps: list[int], passed: bool, says: str) -> None:
    check = check_steps(records(steps), 3)
    assert check.passed is passed
    assert says in check.detail


def test_each_sample_once_an_epoch() -> None:
    order = SampleOrder(seed=3, samples=10, global_batch=4, microbatch=2)
    assert check_samples(records([1, 2, 3, 4, 5, 6]), order).passed, "two epochs and a bit"
    repeated = check_samples(records([1, 2, 2, 3]), order)
    assert not repeated.passed
    assert "4 repeated" in repeated.detail
    left_out = check_samples(records([1, 3, 4]), order)
    assert not left_out.passed
    assert "4 left out" in left_out.detail
    assert not check_samples([], order).passed


def test_losses_are_those_of_the_reference() -> None:
    reference = [5.0, 2.5, 5.0 / 3]
    assert check_losses(records([1, 2, 3]), reference, 1e-4).passed
    near = check_losses([{"step": 2, "loss": 2.5 * 1.001}], reference, 1e-4)
    assert not near.passed
    assert "step 2" in near.detail
    assert not check_losses([{"step": 2, "loss": None}], reference, 1e-4).passed
    assert not check_losses([], reference, 1e-4).passed, "nothing compared proves nothing"


def test_lost_steps_are_within_the_interval() -> None:
    memory = {"source": "memory", "lost_steps": 1}
    cold = {"source": "checkpoint", "lost_steps": 7}
    assert check_lost_steps([memory, cold], interval=1).passed
    assert "8 in 2 restores, 7 at most; 1 from a checkpoint" in (
        check_lost_steps([memory, cold], interval=1).detail
    )
    assert not check_lost_steps([{"source": "memory", "lost_steps": 2}], interval=1).passed
    assert check_lost_steps([], interval=1).passed
    assert check_lost_steps([{"source": "memory", "lost_steps": 2}], interval=None).passed
