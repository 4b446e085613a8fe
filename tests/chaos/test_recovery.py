"""What a run's record says of how it got over a fault."""

from __future__ import annotations

from typing import Any

import pytest

from ray_train_geo.chaos.faults import parse_faults
from ray_train_geo.chaos.recovery import Injection, median_step_s, recoveries


def record(step: int, time: float, generation: int) -> dict[str, Any]:
    return {"step": step, "time": time, "generation": generation, "step_s": 0.5}


RECORDS = [record(1, 10.0, 1), record(2, 10.5, 1), record(3, 13.0, 2), record(4, 20.0, 3)]
EVENTS: list[dict[str, Any]] = [
    {"event": "failure", "time": 11.5},
    {"event": "restore", "time": 11.7, "lost_steps": 1, "source": "memory"},
    {
        "event": "recovery", "time": 13.01, "generation": 2,
        "settle_s": 0.1, "plan_s": 0.2, "transfer_s": 0.3, "build_s": 0.4,
    },
    {"event": "restore", "time": 19.0, "lost_steps": 0, "source": "memory"},
    {"event": "reshape", "time": 20.01, "generation": 3, "build_s": 0.6},
]  # fmt: skip


def injection(kind: str, time: float, generation: int) -> Injection:
    (fault,) = parse_faults(kind)
    return Injection(fault, time, "rank 1", "backward", 2, generation)


def test_a_fault_and_what_followed() -> None:
    (found,) = recoveries([injection("kill-worker", 11.0, 1)], EVENTS, RECORDS)
    assert found.noticed_s == pytest.approx(0.5)
    assert (found.settle_s, found.plan_s, found.transfer_s, found.build_s) == (0.1, 0.2, 0.3, 0.4)
    assert found.commit_s == pytest.approx(2.0)
    assert found.pause_s == pytest.approx(2.5)
    assert found.lost_steps == 1
    assert found.to_json()["injection"]["fault"] == "kill-worker@random"


def test_a_change_without_a_failure() -> None:
    (found,) = recoveries([injection("join", 14.0, 2)], EVENTS, RECORDS)
    assert found.noticed_s is None
    assert found.build_s == 0.6
    assert found.commit_s == pytest.approx(6.0)
    assert found.lost_steps == 0


def test_faults_that_share_a_recovery() -> None:
    both = [injection("kill-worker", 11.0, 1), injection("kill-worker", 11.6, 1)]
    first, second = recoveries(both, EVENTS, RECORDS)
    assert first.commit_s == pytest.approx(2.0)
    assert second.commit_s == pytest.approx(1.4)
    assert second.noticed_s is None, "it was lost in the recovery from the first"


def test_what_changes_nothing_and_what_nobody_got_over() -> None:
    (found,) = recoveries([injection("kill-coordinator", 12.0, 3)], EVENTS, RECORDS)
    assert found.commit_s == pytest.approx(1.0), "simply the next step"
    (lost,) = recoveries([injection("kill-worker", 21.0, 3)], EVENTS, RECORDS)
    assert lost.commit_s is None
    assert lost.pause_s is None


def test_the_median_step() -> None:
    assert median_step_s(RECORDS) == 0.5
    assert median_step_s([]) == 0.0
