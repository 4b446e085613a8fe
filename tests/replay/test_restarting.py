"""Checkpoint and restart: what is lost, how long it takes, and when a new node is let in."""

from __future__ import annotations

import math

import pytest
from replay_cases import asked, fleet, small_job

from ray_train_geo.replay.assumptions import Assumptions, CheckpointRestartCosts, RestartCosts
from ray_train_geo.replay.outcome import Outcome
from ray_train_geo.replay.run import PolicyName, replay_fleet
from ray_train_geo.spec import JobSpec

COSTS = Assumptions(
    checkpoint_restart=CheckpointRestartCosts(detect_s=10.0, restart_s=5.0),
    restart=RestartCosts(replaced_s=30.0, shrunk_s=60.0),
)
TWO_STAGES = small_job({"stages": 2}, global_batch=256)
FOUR = "0+a 0+b 0+c 0+d "


def play(
    policy: PolicyName, text: str, interval_s: float | None = 100.0, job: JobSpec = TWO_STAGES
) -> Outcome:
    there = fleet(text, 1200.0)
    (found,) = replay_fleet(there, asked(there, job), [policy], COSTS, interval_s)
    return found


def used(found: Outcome) -> list[int]:
    return [s.devices for s in found.spans if s.kind == "training"]


def stops(found: Outcome) -> list[tuple[float, float]]:
    return [(s.start_s, s.end_s) for s in found.spans if s.kind == "stopped"]


def test_without_events_only_checkpoints_cost_time() -> None:
    found = play("checkpoint-restart", FOUR)
    (span,) = found.spans
    assert found.downtime_s == pytest.approx(span.saving_s)
    assert found.downtime_s == pytest.approx(12 * span.save_s, rel=0.1)
    assert found.goodput == pytest.approx(1 - found.downtime_s / 1200, abs=1e-3)


def test_a_loss_goes_back_to_the_checkpoint() -> None:
    found = play("checkpoint-restart", FOUR + "650-b")
    first, _, second = found.spans
    assert used(found) == [4, 2], "one device is idle: there is one pipeline of two"
    assert found.undone_steps == first.unsaved == first.undone
    assert 30.0 < first.undone * first.step_s < 60.0, "half an interval of 100 s"
    assert stops(found) == [(650.0, pytest.approx(665.0, abs=0.5))]
    assert second.end_s == 1200.0


def test_a_spare_takes_over_but_not_without_a_stop() -> None:
    found = play("checkpoint-restart", FOUR + "0+e 650-b")
    assert used(found) == [4, 4]
    assert found.downtime_s > 15.0


def test_more_pipelines_start_behind_a_checkpoint() -> None:
    found = play("checkpoint-restart", "0+a 0+b 250+c 330+d")
    assert used(found) == [2, 4]
    assert found.undone_steps == 0
    ((began, ended),) = stops(found)
    assert 330.0 < began < 430.0
    assert ended - began == pytest.approx(5.0, abs=0.5), "nothing has to be detected"


def test_a_plain_launcher_restarts_at_every_join() -> None:
    found = play("restart", "0+a 0+b 250+c 650+d")
    assert used(found) == [2, 2, 4]
    assert [began for began, _ in stops(found)] == [250.0, 650.0]
    assert all(b - a == pytest.approx(30.0, abs=0.5) for a, b in stops(found))
    assert found.undone_steps > 0


def test_a_plain_launcher_takes_longer_to_shrink() -> None:
    ((began, ended),) = stops(play("restart", FOUR + "650-b"))
    assert ended - began == pytest.approx(60.0, abs=0.5)
    ((began, ended),) = stops(play("restart", FOUR + "650-b 650+e"))
    assert ended - began == pytest.approx(30.0, abs=0.5)


def test_a_loss_while_it_restarts_starts_the_restart_again() -> None:
    found = play("checkpoint-restart", FOUR + "0+e 650-b 655-c")
    assert (stops(found)[0][0], stops(found)[-1][1]) == (650.0, pytest.approx(670.0, abs=0.5))
    assert used(found) == [4, 2]
    once = play("checkpoint-restart", FOUR + "0+e 650-b")
    assert found.undone_steps == once.undone_steps, "steps are undone once"


def test_too_few_wait_and_too_few_never_begin() -> None:
    found = play("checkpoint-restart", "0+a 0+b 600-a 700+c")
    assert found.waiting_s == 100.0
    assert used(found) == [2, 2]
    assert play("checkpoint-restart", "0+a 100+b 150-b 200+c").waiting_s == 150.0


def test_youngs_interval() -> None:
    found = play("checkpoint-restart", FOUR + "300-a 600+e 900-b", interval_s=None)
    span = found.spans[0]
    interval_s = span.steps_per_save * span.step_s
    assert interval_s == pytest.approx(math.sqrt(2 * span.save_s * 600.0), abs=span.step_s)
