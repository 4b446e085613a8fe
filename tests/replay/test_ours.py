"""Our policy, moment by moment: what a loss, a join, a notice and a catastrophe cost."""

from __future__ import annotations

import pytest
from replay_cases import asked, fleet, small_job

from ray_train_geo.replay.assumptions import Assumptions, OursCosts
from ray_train_geo.replay.ledger import Span
from ray_train_geo.replay.outcome import Outcome
from ray_train_geo.replay.run import replay_fleet
from ray_train_geo.spec import JobSpec

COSTS = OursCosts(detect_s=5.0, plan_s=1.0, better_plan_s=2.0, rebuild_s=0.5, join_s=4.0)
ONE_PIPELINE = small_job({"pipelines": 1})
REPLICAS = small_job({"stages": 1}, global_batch=256)
"""Every device holds all layers, and computes long enough for all of them to be used."""


def play(
    text: str, end_s: float = 1200.0, job: JobSpec | None = None, costs: OursCosts = COSTS
) -> Outcome:
    there = fleet(text, end_s)
    (found,) = replay_fleet(there, asked(there, job), ["ours"], Assumptions(ours=costs), 60.0)
    return found


def spans(found: Outcome, kind: str) -> list[Span]:
    return [s for s in found.spans if s.kind == kind]


def test_without_events_every_device_trains_all_the_time() -> None:
    found = play("0+a 0+b 0+c")
    assert found.goodput == pytest.approx(1.0, abs=1e-4)
    assert (found.undone_steps, found.downtime_s, found.replans) == (0, 0.0, 1)


def test_stated_overhead_is_all_that_an_undisturbed_run_loses() -> None:
    found = play("0+a 0+b 0+c", costs=OursCosts(step_overhead=0.03))
    assert found.goodput == pytest.approx(1 / 1.03, abs=1e-4)


def test_a_loss_costs_one_step_and_a_short_stop() -> None:
    found = play("0+a 0+b 0+c 600-b", job=REPLICAS)
    first, second = spans(found, "training")
    (stopped,) = spans(found, "stopped")
    assert (found.undone_steps, found.cut_off_steps) == (0, 2), "the other at the very end"
    assert (stopped.start_s, second.start_s) == (600.0, stopped.end_s)
    assert stopped.seconds == COSTS.detect_s + COSTS.plan_s + COSTS.rebuild_s
    assert (first.devices, second.devices) == (3, 2)
    assert first.lost_s < first.step_s


def test_an_idle_device_may_go() -> None:
    job = small_job({"pipelines": 1, "stages": 2})
    (whole,) = spans(play("0+a 0+b 0+c", job=job), "training")
    assert whole.devices == 2
    found = [play(f"0+a 0+b 0+c 600-{gone}", job=job).downtime_s for gone in "abc"]
    assert sorted(found)[0] == 0.0
    assert min(sorted(found)[1:]) > 6.0
    assert play("0+a 0+b 0+c", job=job).idle_device_s == pytest.approx(1200.0)


def test_a_join_stops_nobody_for_long() -> None:
    found = play("0+a 0+b 300+c", job=REPLICAS)
    first, second = spans(found, "training")
    assert (first.devices, second.devices) == (2, 3)
    assert 304.0 < second.start_s < 310.0, "the worker starts, then receives, while others train"
    assert found.downtime_s <= 0.5 + second.step_s + 1e-9
    assert first.lost_s == pytest.approx(0.0, abs=1e-6)


def test_a_notice_in_time_saves_every_step() -> None:
    found = play("0+a 0+b 0+c 300!b 420-b")
    assert found.undone_steps == 0
    assert all(s.lost_s == pytest.approx(0.0, abs=1e-6) for s in spans(found, "training")[:-1])
    assert found.downtime_s <= 0.5 + found.spans[-1].step_s + 1e-9
    moved = spans(found, "training")[1]
    assert 301.0 < moved.start_s < 310.0
    assert moved.devices == 2
    assert found.notices == 1


def test_a_notice_too_late_is_a_loss() -> None:
    found = play("0+a 0+b 0+c 300!b 300.5-b")
    assert found.downtime_s == pytest.approx(6.5, abs=0.5)


def test_a_single_pipeline_goes_on_from_the_copy_in_memory() -> None:
    found = play("0+a 0+b 0+c 0+d 600.001-b", job=small_job({"pipelines": 1, "stages": 3}))
    assert found.undone_steps == 1
    assert found.waiting_s == 0.0


def test_who_holds_a_layer_and_its_copy_both_gone_means_the_checkpoint() -> None:
    job = small_job({"pipelines": 1, "stages": 4})
    found = play("0+a 0+b 0+c 0+d 630-b 630-c 630-d 700+f 700+g 700+h", job=job)
    before = spans(found, "training")[0]
    assert before.undone * before.step_s == pytest.approx(30.0, abs=1.0), "saved every 60 s"
    assert found.waiting_s == pytest.approx(70 + COSTS.join_s)


def test_another_loss_during_recovery_starts_it_again() -> None:
    found = play("0+a 0+b 0+c 0+d 600-b 603-c", job=REPLICAS)
    (stopped,) = [s for s in _merged(found) if s[0] == "stopped"]
    assert stopped[1] == 600.0
    assert stopped[2] == pytest.approx(609.5)
    assert found.undone_steps == 0, "two devices still have everything"


def test_a_node_that_comes_back_has_forgotten() -> None:
    found = play("0+a 0+b 600-b 600+b", job=ONE_PIPELINE)
    assert found.replans >= 2
    assert found.downtime_s > 6.0


def test_it_begins_when_there_are_devices_enough() -> None:
    found = play("0+a 100+b", job=small_job({"stages": 2}))
    assert found.waiting_s == 100.0
    assert spans(found, "training")[0].start_s == 100.0
    assert found.downtime_s == 0.0


def test_from_nothing_to_nothing_and_back() -> None:
    found = play("0+a 0+b 600-a 600-b 900+c")
    assert found.waiting_s == pytest.approx(300 + COSTS.join_s)
    before = spans(found, "training")[0]
    assert before.undone * before.step_s == pytest.approx(60.0, abs=1.0), "that of 600 s is cut off"
    assert spans(found, "training")[-1].start_s > 904


def _merged(found: Outcome) -> list[tuple[str, float, float]]:
    """Spans, neighbours of one kind as one."""
    merged: list[tuple[str, float, float]] = []
    for s in found.spans:
        if merged and merged[-1][0] == s.kind:
            merged[-1] = s.kind, merged[-1][1], s.end_s
        else:
            merged.append((s.kind, s.start_s, s.end_s))
    return merged
