"""Who must still commit, and from which step all can go on."""

from __future__ import annotations

import pytest

from ray_train_geo.errors import WorkerError
from ray_train_geo.training.precision import LossScale
from ray_train_geo.training.standing import (
    Bequest,
    Holding,
    Standing,
    Totals,
    common_state,
    settlement,
)

TOTALS = Totals(12.5, 0.25)
SCALE = LossScale(4.0, 2)


def stands(
    step: int | None, prepared: int | None = None, totals: Totals | None = None, *held: Holding
) -> Standing:
    return Standing(step, prepared, totals, (), held)


def held(step: int, names: str) -> Holding:
    return Holding(step, step, SCALE, frozenset(names))


def test_who_is_behind_commits_with_the_totals_of_one_that_did() -> None:
    standings = {
        "a": stands(8, None, TOTALS),
        "b": stands(7, 8, Totals(1.0, 1.0)),
        "new": stands(None),
    }
    assert settlement(standings) == (8, TOTALS, ["b"])


def test_what_nobody_alive_has_committed_is_replayed_by_all() -> None:
    standings = {"a": stands(7, 8, TOTALS), "b": stands(7, None, TOTALS)}
    assert settlement(standings) == (7, TOTALS, [])
    assert settlement({"new": stands(None)}) == (None, None, [])
    assert settlement({}) == (None, None, [])


@pytest.mark.parametrize("behind", [stands(6, None, TOTALS), stands(5, 6, TOTALS)])
def test_one_that_can_not_follow_is_an_error(behind: Standing) -> None:
    with pytest.raises(WorkerError, match="can't commit step 7"):
        settlement({"a": stands(7, None, TOTALS), "b": behind})


def test_the_newest_step_that_is_whole() -> None:
    standings = {
        "a": stands(8, None, TOTALS, held(8, "xy"), held(7, "xy")),
        "b": stands(8, None, TOTALS, held(7, "z"), held(7, "y"), held(6, "xyz")),
    }
    common = common_state(standings, "xyz")
    assert common is not None
    assert (common.step, common.updates, common.loss_scale) == (7, 7, SCALE)
    assert common.holders == {"x": ("a",), "y": ("a", "b"), "z": ("b",)}
    whole = common_state(standings, "xy")
    assert whole is not None
    assert whole.step == 8
    assert common_state(standings, "xyzw") is None
    assert common_state({}, "x") is None


def test_a_step_that_is_not_committed_is_nobodys() -> None:
    """Under local SGD, a has applied step 9, which the lost island never had."""
    standings = {
        "a": stands(8, 9, TOTALS, held(9, "xy"), held(8, "xy")),
        "b": stands(7, 8, None, held(8, "xy"), held(7, "xy")),
    }
    common = common_state(standings, "xy")
    assert common is not None
    assert (common.step, common.holders) == (8, {"x": ("a", "b"), "y": ("a", "b")})
    # After a generation that was never built nobody knows it but the coordinator.
    nobody = {worker: stands(None, None, None, *s.holdings) for worker, s in standings.items()}
    assert common_state(nobody, "xy", 8) == common


def test_who_comes_takes_over_what_is_left_behind() -> None:
    def holding(residuals: str, *spares: tuple[str, str]) -> Holding:
        scale = LossScale(1.0, 0)
        return Holding(5, 5, scale, frozenset("w"), frozenset(residuals), frozenset(spares))

    standings = {
        "a": Standing(5, None, None, (), (holding("w", ("w", "lost")),)),
        "b": Standing(5, None, None, (), (holding("w", ("w", "a"), ("w", "lost")),)),
        "leaves": Standing(5, None, None, (), (holding("w"),)),
    }
    common = common_state(standings, ["w"])
    assert common is not None
    assert common.spares == {"w": (("lost", "a"),)}, "a has its own, and one copy is enough"
    assert common.bequests({"w": ["a", "new", "b"]}) == {
        "new": {"w": [Bequest("leaves")]},
        "a": {"w": [Bequest("a", "lost")]},
    }
