"""A device that changes on its own stands out; what slows all, or was always so, does not."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping

import pytest

from ray_train_geo.cluster.topology import Device
from ray_train_geo.planning.plan import PipelinePlan, Plan, StagePlan
from ray_train_geo.planning.stragglers import Straggler, StragglerWatch


def made(*pipelines: tuple[tuple[int, int], ...]) -> Plan:
    """Devices are named p0s0, p0s1, ..."""
    names = [[f"p{p}s{s}" for s in range(len(stages))] for p, stages in enumerate(pipelines)]
    return Plan(
        layers=pipelines[0][-1][1],
        pipelines=tuple(
            PipelinePlan(
                tuple(StagePlan(n, run, 1) for n, run in zip(row, stages, strict=True)), 4, 4 * p
            )
            for p, (row, stages) in enumerate(zip(names, pipelines, strict=True))
        ),
        schedule="1f1b",
        gradient_sync="allreduce",
        devices=tuple(Device(n, n) for row in names for n in row),
        predicted_step_s=1.0,
    )


def watched(
    plan: Plan, speed: Callable[[str, float], float], seconds: float = 90.0, noise: float = 0.0
) -> list[tuple[float, Straggler]]:
    """What shows within ``seconds``; ``speed(device, time)`` is seconds over predicted seconds."""
    rng = random.Random(1)
    predicted: Mapping[str, float] = {d.id: 0.1 for d in plan.devices}
    watch, found = StragglerWatch(plan, predicted), []
    for i in range(int(seconds)):
        now_s = float(i)
        observed = {
            d: s * speed(d, now_s) * rng.lognormvariate(0, noise) for d, s in predicted.items()
        }
        found += [(now_s, straggler) for straggler in watch.add(now_s, observed)]
    return found


TWO_BY_TWO = made(((0, 2), (2, 4)), ((0, 2), (2, 4)))


def test_a_device_that_slows_down_is_told_once() -> None:
    found = watched(TWO_BY_TWO, lambda d, t: 2.0 if d == "p0s1" and t >= 44 else 1.0)
    ((when_s, straggler),) = found
    assert straggler.device == "p0s1"
    assert straggler.ratio == pytest.approx(2.0)
    assert straggler.observed_s == pytest.approx(0.2)
    assert straggler.predicted_s == 0.1
    assert 55 <= when_s <= 60


def test_one_of_two_devices_is_the_straggler_and_the_other_is_not() -> None:
    plan = made(((0, 2), (2, 4)))
    found = watched(plan, lambda d, t: 3.0 if d == "p0s0" and t >= 44 else 1.0)
    assert [s.device for _, s in found] == ["p0s0"]


def test_it_is_told_again_when_it_has_recovered() -> None:
    found = watched(
        TWO_BY_TWO, lambda d, t: 2.0 if d == "p1s0" and 44 <= t < 100 else 1.0, seconds=180
    )
    assert [(s.device, round(s.ratio, 3)) for _, s in found] == [("p1s0", 2.0), ("p1s0", 0.5)]


def test_a_load_on_all_is_nobodys_fault() -> None:
    assert watched(TWO_BY_TWO, lambda d, t: 3.0 if t >= 44 else 1.0) == []


def test_what_predictions_miss_by_is_usual() -> None:
    """A head that takes three times as long as predicted has always done so."""
    assert watched(TWO_BY_TWO, lambda d, t: 3.0 if d.endswith("s1") else 1.0) == []


def test_noise_and_dips_are_not_told() -> None:
    for noise in (0.25, 0.6):
        assert watched(TWO_BY_TWO, lambda d, t: 1.0, seconds=3000, noise=noise) == []
        three = made(*[((0, 2), (2, 4))] * 3)
        assert watched(three, lambda d, t: 1.0, seconds=3000, noise=noise) == []
    assert watched(TWO_BY_TWO, lambda d, t: 9.0 if d == "p0s0" and 44 <= t < 50 else 1.0) == []


def test_of_stages_alike_one_that_was_always_slow_shows() -> None:
    plan = made(*[((0, 2), (2, 4))] * 3)
    found = watched(plan, lambda d, t: 2.0 if d == "p2s1" else 1.0)
    assert [s.device for _, s in found] == ["p2s1"]


def test_a_device_alone_is_held_against_itself() -> None:
    found = watched(made(((0, 4),)), lambda d, t: 2.0 if t >= 44 else 1.0)
    assert [s.device for _, s in found] == ["p0s0"]


def test_who_keeps_its_layers_is_held_against_what_was_usual_before() -> None:
    plan = made(((0, 2), (2, 4)))
    before = StragglerWatch(plan, {"p0s0": 0.1, "p0s1": 0.1})
    for i in range(40):
        before.add(float(i), {"p0s0": 0.1, "p0s1": 0.3})
    watch = StragglerWatch(plan, {"p0s0": 0.1, "p0s1": 0.1}, before)
    slower = [1.0 if i < 24 else 2.0 for i in range(60)]
    found = [watch.add(float(i), {"p0s0": 0.1 * s, "p0s1": 0.3}) for i, s in enumerate(slower)]
    assert [s.device for stragglers in found for s in stragglers] == ["p0s0"]
