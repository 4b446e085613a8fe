"""Replica groups: one falls out as a whole, and comes back as a whole."""

from __future__ import annotations

import pytest
from replay_cases import asked, fleet, small_job

from ray_train_geo.replay.assumptions import Assumptions, TorchftCosts
from ray_train_geo.replay.outcome import Outcome
from ray_train_geo.replay.run import replay_fleet
from ray_train_geo.spec import JobSpec

COSTS = Assumptions(torchft_like=TorchftCosts(failure_s=5.0, start_s=4.0))
TWO_STAGES = small_job({"stages": 2}, global_batch=256)
FOUR = "0+a 0+b 0+c 0+d "


def play(text: str, job: JobSpec = TWO_STAGES, gpus: int = 1) -> Outcome:
    there = fleet(text, 1200.0, gpus)
    (found,) = replay_fleet(there, asked(there, job), ["torchft-like"], COSTS, 100.0)
    return found


def used(found: Outcome) -> list[int]:
    return [s.devices for s in found.spans if s.kind == "training"]


def test_without_events() -> None:
    assert play(FOUR).goodput == pytest.approx(1.0, abs=1e-3)


def test_a_group_falls_out_and_the_others_go_on() -> None:
    found = play(FOUR + "600-b")
    assert used(found) == [4, 2]
    assert found.downtime_s == pytest.approx(5.0)
    assert found.undone_steps == 0
    assert found.idle_device_s == pytest.approx(595.0, rel=0.01), "b's partner"


def test_a_group_comes_back_without_a_stop() -> None:
    found = play(FOUR + "600-b 700+e")
    assert used(found) == [4, 2, 4]
    assert found.downtime_s == pytest.approx(5.0)
    assert 704.0 < found.spans[-1].start_s < 710.0
    before = found.spans[-2]
    assert before.lost_s == pytest.approx(0.0, abs=1e-6), "it enters at the end of a step"


def test_who_leaves_while_healing_does_not_enter() -> None:
    assert used(play(FOUR + "600-b 700+e 702-e")) == [4, 2]


def test_another_loss_while_stopped() -> None:
    found = play(FOUR + "0+e 0+f 600-b 603-c")
    stopped = [s for s in found.spans if s.kind == "stopped"]
    assert sum(s.seconds for s in stopped) >= 5.0
    assert used(found)[0] == 6


def test_the_last_group_takes_the_state_along() -> None:
    found = play("0+a 0+b 650-b 700+c")
    first = found.spans[0]
    assert 30.0 < first.undone * first.step_s < 60.0, "half an interval of 100 s"
    assert found.waiting_s == 50.0
    assert used(found) == [2, 2]


def test_idle_devices_start_from_the_checkpoint_when_the_last_group_goes() -> None:
    found = play("0+a 0+b 640+c 650-b")
    assert used(found) == [2, 2]
    assert found.downtime_s == pytest.approx(5.0 + 4.0, abs=0.5)


def test_a_node_takes_all_its_groups_along() -> None:
    found = play("0+a 0+b 0+c 600-b", small_job({"stages": 1}, global_batch=256), gpus=2)
    assert used(found) == [6, 4]
