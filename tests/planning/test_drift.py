from __future__ import annotations

import random

import pytest

from ray_train_geo.planning.drift import Drift


def told(values: list[float], every_s: float = 1.0) -> list[tuple[float, float]]:
    """When (in seconds) a drift showed, and its ratio; what was told is usual from then on."""
    drift, found = Drift(2.0, 10.0), []
    for i, value in enumerate(values):
        drift.add(i * every_s, value)
        if (ratio := drift.ratio) is not None:
            found.append((i * every_s, ratio))
            drift.settle()
    return found


def test_a_change_that_lasts_is_told_once_it_has_lasted() -> None:
    assert told([1.0] * 40 + [10.0] * 40) == [(48.0, 10.0)]  # it began at 40 s
    assert told([1.0] * 40 + [0.1] * 40) == [(48.0, 0.1)]


@pytest.mark.parametrize("samples", [1, 3, 5, 7])
def test_a_dip_is_not(samples: int) -> None:
    assert told([1.0] * 40 + [10.0] * samples + [1.0] * 40) == []


@pytest.mark.parametrize("noise", [0.3, 0.6])
def test_noise_is_not(noise: float) -> None:
    for seed in range(20):
        rng = random.Random(seed)
        assert told([rng.lognormvariate(0, noise) for _ in range(500)]) == []


def test_a_change_shows_through_noise() -> None:
    rng = random.Random(0)
    values = [rng.lognormvariate(0, 0.3) * (4 if i >= 60 else 1) for i in range(80)]
    ((when_s, ratio),) = told(values)
    assert 66 <= when_s <= 80
    assert ratio == pytest.approx(4, rel=0.4)


def test_one_usual_sample_among_others_does_not_hide_a_change() -> None:
    assert told([1.0] * 40 + [*[5.0] * 5, 1.0, *[5.0] * 5]) != []


def test_few_samples_take_longer() -> None:
    assert [when_s for when_s, _ in told([1.0] * 12 + [4.0] * 6, every_s=30.0)] == [480.0]


def test_a_change_there_and_back_is_told_twice() -> None:
    assert [ratio for _, ratio in told([1.0] * 40 + [5.0] * 40 + [1.0] * 40)] == [5.0, 0.2]


def test_what_is_cold_does_not_count_and_what_is_known_does() -> None:
    drift = Drift(2.0, 10.0, usual=[1.0] * 8)
    for i, value in enumerate([1.0, *[3.0] * 11]):
        assert drift.ratio is None
        drift.add(float(i), value)
    assert drift.ratio == 3.0
    assert drift.usual == (1.0,) * 8
