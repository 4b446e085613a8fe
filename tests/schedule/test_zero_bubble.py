from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_train_geo.schedule.actions import Action
from ray_train_geo.schedule.make import make_schedule
from ray_train_geo.schedule.one_f_one_b import one_f_one_b, validate
from ray_train_geo.schedule.timeline import Hop, Timeline, timeline
from ray_train_geo.schedule.zero_bubble import deferred_weights, zero_bubble


def run(actions: list[list[Action]], hop_s: float = 0.0) -> Timeline:
    """F, B and W take one slot each."""
    ones, hops = [1.0] * len(actions), [Hop(hop_s, 0.0)] * (len(actions) - 1)
    return timeline(actions, ones, ones, hops, hops, weight_s=ones)


def picture(actions: list[list[Action]], hop_s: float = 0.0) -> list[str]:
    found = run(actions, hop_s)
    return found.ascii(round(found.makespan_s)).split()


def test_picture_of_the_papers_first_schedule() -> None:
    """ZB-H1: 1F1B's memory, and idle only until the first input is there, on all but the first."""
    assert picture(zero_bubble([3, 2, 1, 0], [0, 1, 2, 3], 6)) == [
        "0123...aA4bB5cCdDeEfF",
        ".012..a3bA4cB5dCeDfEF",
        "..01.a2b3cA4dB5eCfDEF",
        "...0a1b2c3dA4eB5fCDEF",
    ]


def test_picture_of_a_slow_hop() -> None:
    # One slot of latency: one more warmup forward, and one more W to put off.
    assert picture(zero_bubble([2, 0], [0, 2], 4), hop_s=1.0) == [
        "012..aA3bBcCdD",
        "..0a1b2cA3dBCD",
    ]


def test_one_stage_puts_nothing_off() -> None:
    assert picture(zero_bubble([0], [0], 3)) == ["0aA1bB2cC"]


@pytest.mark.parametrize("stages", [1, 2, 4, 8])
@pytest.mark.parametrize("microbatches", [24, 40])
@pytest.mark.parametrize("hop_s", [0.0, 0.5, 2.0])
def test_the_last_stage_is_never_idle_once_it_has_begun(
    stages: int, microbatches: int, hop_s: float
) -> None:
    """So nothing is faster; 1F1B waits for the way back, too."""
    per_hop = 1 + math.ceil(2 * hop_s / 3)
    warmup = [min(per_hop * (stages - 1 - s), microbatches - 1) for s in range(stages)]
    tail_s = [s * (1.0 + hop_s) for s in range(stages)]
    deferred = deferred_weights(tail_s, [1.0] * stages, [microbatches] * stages)
    split = run(zero_bubble(warmup, deferred, microbatches), hop_s)
    first_input_s = (stages - 1) * (1.0 + hop_s)
    ends_s = first_input_s + 3.0 * microbatches
    assert split.end_s(stages - 1) == split.makespan_s == pytest.approx(ends_s)
    ones, hops = [1.0] * stages, [Hop(hop_s, 0.0)] * (stages - 1)
    whole = timeline(one_f_one_b(warmup, microbatches), ones, [2.0] * stages, hops, hops)
    assert whole.makespan_s >= ends_s + (stages - 1) * (2.0 + hop_s) - 1e-9


@given(
    st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), min_size=1, max_size=6),
    st.integers(1, 20),
)
def test_every_action_once_in_order_and_memory_bounded(
    counts: list[tuple[int, int]], microbatches: int
) -> None:
    warmup = sorted((w for w, _ in counts), reverse=True)
    deferred = [d for _, d in counts]
    actions = zero_bubble(warmup, deferred, microbatches)
    validate(actions)
    found = run(actions, 0.5)
    for s, todo in enumerate(actions):
        assert found.peak_in_flight(s) <= min(warmup[s] + deferred[s] + 1, microbatches)
        # Weights' gradients add up in the order of microbatches, however much is put off.
        assert [a.microbatch for a in todo if a.kind == "W"] == list(range(microbatches))
        assert [a for a in todo if a.kind != "W"] == one_f_one_b(warmup, microbatches)[s]
        waiting = 0
        for action in todo:
            waiting += (action.kind == "B") - (action.kind == "W")
            assert waiting <= deferred[s] + 1


def test_what_is_put_off_fills_the_last_wait() -> None:
    assert deferred_weights([0.0, 1.0, 2.5], [1.0, 1.0, 1.0], [9, 9, 9]) == (0, 1, 3)
    assert deferred_weights([0.0, 1.0, 2.5], [1.0, 0.5, 1.0], [9, 9, 2]) == (0, 2, 2)
    assert deferred_weights([0.0], [0.0], [9]) == (0,)


def test_by_name() -> None:
    assert make_schedule("zero-bubble", [1, 0], [0, 1], 4) == zero_bubble([1, 0], [0, 1], 4)
    assert make_schedule("1f1b", [1, 0], [0, 1], 4) == one_f_one_b([1, 0], 4)
    assert make_schedule("gpipe", [1, 0], [0, 0], 4) == one_f_one_b([4, 4], 4)


@pytest.mark.parametrize(
    ("warmup", "deferred"), [([1, 0], [1]), ([1, 0], [0, -1]), ([0, 1], [0, 0])]
)
def test_refuses_wrong_input(warmup: list[int], deferred: list[int]) -> None:
    with pytest.raises(ValueError, match=r"deferred|warmup"):
        zero_bubble(warmup, deferred, 4)


def test_validate_finds_a_w_before_its_b_and_a_missing_one() -> None:
    f, b, w = (Action(kind, 0) for kind in ("F", "B", "W"))
    with pytest.raises(ValueError, match="stage 0: W0 needs B0 before it"):
        validate([[f, w, b]])
    with pytest.raises(ValueError, match=r"stage 1: every F and B and W of 1 .* missing: W0"):
        validate([[f, b, w], [f, b]])


def test_a_w_needs_its_seconds() -> None:
    with pytest.raises(ValueError, match="weight_s is needed"):
        timeline(zero_bubble([0], [0], 1), [1.0], [1.0], [], [])
    with pytest.raises(ValueError, match="are needed for all 1 stages"):
        timeline(zero_bubble([0], [0], 1), [1.0], [1.0], [], [], weight_s=[1.0, 1.0])
