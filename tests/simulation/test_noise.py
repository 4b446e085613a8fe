"""Jitter and stragglers."""

from __future__ import annotations

import numpy as np
import pytest

from ray_train_geo.schedule.gpipe import gpipe
from ray_train_geo.schedule.timeline import Hop, timeline
from ray_train_geo.simulation.noise import paces


def makespan_s(pace):
    hop = [Hop(0.0, 0.0)] * 3
    return timeline(gpipe(4, 200), [1.0] * 4, [2.0] * 4, hop, hop, pace=pace).makespan_s


def test_no_noise_changes_nothing():
    assert makespan_s(paces(gpipe(4, 200))) == makespan_s(None)


def test_jitter_has_the_given_spread_and_keeps_the_mean():
    factors = np.array(paces(gpipe(4, 2000), jitter=0.2, seed=1))
    assert factors.mean() == pytest.approx(1.0, abs=0.01)
    assert factors.std() == pytest.approx(0.2, abs=0.01)


def test_a_straggler_sets_the_pace_of_its_pipeline():
    slow = makespan_s(paces(gpipe(4, 200), stragglers={2: 1.5}))
    assert slow == pytest.approx(1.5 * 200 * 3 + 3 * 3)  # its own time, fill and drain


def test_jitter_makes_a_pipeline_wait_and_the_seed_says_how():
    actions = gpipe(4, 200)
    assert makespan_s(paces(actions, jitter=0.3, seed=3)) > makespan_s(None)
    assert paces(actions, jitter=0.3, seed=3) == paces(actions, jitter=0.3, seed=3)
    assert paces(actions, jitter=0.3, seed=3) != paces(actions, jitter=0.3, seed=4)


@pytest.mark.parametrize(
    ("noise", "message"),
    [
        ({"jitter": -0.1}, "jitter is 0 or more"),
        ({"stragglers": {4: 2.0}}, "stage 4 of 4"),
        ({"stragglers": {0: 0.0}}, "factor 0.0"),
    ],
)
def test_refuses_what_makes_no_sense(noise, message):
    with pytest.raises(ValueError, match=message):
        paces(gpipe(4, 1), **noise)
