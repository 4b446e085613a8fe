from __future__ import annotations

from ray_train_geo.planning.budget import Budget


def test_shares_of_a_budget():
    now = [100.0]
    budget = Budget(10, clock=lambda: now[0])
    assert not budget.spent(0.4)
    now[0] = 104.5
    assert budget.spent(0.4)
    assert not budget.spent()
    now[0] = 110.0
    assert budget.spent()


def test_without_a_limit_nobody_looks_at_the_clock():
    def clock() -> float:
        raise AssertionError("the clock was read")

    assert not Budget(None, clock).spent(0.0)
