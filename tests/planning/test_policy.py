"""Moves happen only where they pay, and never too often, whatever is predicted."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_train_geo.cluster.topology import Device
from ray_train_geo.planning import policy
from ray_train_geo.planning.policy import (
    ChangeHistory,
    MovePolicy,
    Offer,
    Verdict,
    time_between_changes_s,
)

HOUR = 3600.0


def fleet(spot: int = 0, on_demand: int = 0) -> list[Device]:
    return [
        *(Device(f"s{i}/0", f"s{i}", market_type="spot") for i in range(spot)),
        *(Device(f"d{i}/0", f"d{i}") for i in range(on_demand)),
    ]


def test_spot_nodes_are_expected_to_go_and_others_hardly() -> None:
    assert time_between_changes_s(fleet(spot=1)) == pytest.approx(4 * HOUR)
    assert time_between_changes_s(fleet(spot=8)) == pytest.approx(HOUR / 2)
    assert time_between_changes_s(fleet(on_demand=2)) > 3000 * HOUR
    assert time_between_changes_s([]) == math.inf
    two_on_a_node = [Device("a/0", "a", market_type="spot"), Device("a/1", "a", market_type="spot")]
    assert time_between_changes_s(two_on_a_node) == pytest.approx(4 * HOUR)


def test_the_runs_own_history_counts_and_fades() -> None:
    history, devices = ChangeHistory(), fleet(on_demand=2)
    calm = history.expected_s(devices, 0.0)
    for now_s in range(0, 600, 60):
        history.happened(float(now_s))
    stormy = history.expected_s(devices, 600.0)
    assert 60 < stormy < 600
    assert stormy < history.expected_s(devices, 2 * HOUR) < history.expected_s(devices, 9 * HOUR)
    assert history.expected_s(devices, 100 * HOUR) == pytest.approx(calm, rel=1e-3)


def test_a_better_plan_is_adopted_if_the_time_suffices() -> None:
    devices, offer = fleet(spot=8), Offer("b", 10.0, 8.0, moving_s=20.0)
    moves = MovePolicy(0.0)
    moves.paused(2.0)
    calm = moves.judge(offer, devices, 0.0)
    assert calm.adopt
    assert calm.cost_s == 22.0
    assert calm.gain_s == pytest.approx(0.2 * HOUR / 2)
    for now_s in range(0, 300, 20):
        moves.history.happened(float(now_s))
    stormy = moves.judge(offer, devices, 300.0)
    assert not stormy.adopt
    assert "before the next change" in stormy.reason


def test_what_a_prediction_may_miss_by_is_no_gain() -> None:
    verdict = MovePolicy(0.0).judge(Offer("b", 10.0, 9.9, 0.0), fleet(on_demand=1), 0.0)
    assert not verdict.adopt
    assert "below 3%" in verdict.reason


def test_a_pause_costs_what_the_last_ones_took() -> None:
    moves = MovePolicy(0.0)
    for pause_s in (90.0, 1.0, 2.0, 3.0, 1.5, 2.5):
        moves.paused(pause_s)
    assert moves.pause_s == 2.0


def test_two_plans_do_not_alternate() -> None:
    """Each measurement says that the other plan is 10% better."""
    moves, here, there, changes = MovePolicy(0.0), "a", "b", 0
    for hour in range(200):
        now_s = hour * HOUR
        verdict = moves.judge(Offer(there, 1.0, 0.9, 1.0), fleet(on_demand=1), now_s)
        if verdict.adopt:
            moves.moved(here, verdict.cost_s, now_s)
            here, there, changes = there, here, changes + 1
    assert changes <= 5


@st.composite
def _life(draw: st.DrawFn) -> list[tuple[float, Offer]]:
    moments = draw(st.lists(st.floats(0.01, 500.0), min_size=1, max_size=60))
    now_s, life = 0.0, []
    for i, wait_s in enumerate(moments):
        now_s += wait_s
        better = draw(st.floats(0.01, 1.5))
        life.append((now_s, Offer(i, 1.0, better, draw(st.floats(0.0, 100.0)))))
    return life


@given(_life(), st.lists(st.floats(0.0, 5000.0), max_size=20), st.integers(1, 64))
def test_moves_pay_and_are_bounded(
    life: list[tuple[float, Offer]], changes: list[float], nodes: int
) -> None:
    moves, devices = MovePolicy(0.0), fleet(spot=nodes)
    coming, adopted = sorted(changes), list[Verdict]()
    for now_s, offer in life:
        while coming and coming[0] <= now_s:
            moves.history.happened(coming.pop(0))
        verdict = moves.judge(offer, devices, now_s)
        if verdict.adopt:
            assert verdict.gain_s > verdict.cost_s, "the gain did not pay"
            moves.moved(("left", now_s), verdict.cost_s, now_s)
            adopted.append(verdict)
    costs = [v.cost_s for v in adopted]
    end_s = life[-1][0]
    assert sum(costs) <= policy._SHARE * end_s + 3 * max(costs, default=0.0) + 1e-9
