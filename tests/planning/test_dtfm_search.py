from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_train_geo.planning.dtfm_classes import ClassProblem
from ray_train_geo.planning.dtfm_search import search


def random_problem(seed, stages=4, replicas=3, classes=5, spare=2):
    random = np.random.default_rng(seed)
    places = random.random((classes, 2))
    apart = np.hypot(*(places[:, None] - places[None, :]).transpose(2, 0, 1))
    sizes = random.multinomial(stages * replicas + spare - classes, [1 / classes] * classes) + 1
    return ClassProblem(stages, replicas, tuple(map(int, sizes)), 0.1 + apart, 0.2 + 3 * apart)


@settings(max_examples=20)
@given(st.integers(0, 1000), st.integers(1, 5), st.integers(1, 4), st.integers(0, 3))
def test_groups_have_the_right_size_and_use_no_device_twice(seed, stages, replicas, spare):
    problem = random_problem(seed, stages, replicas, min(5, stages * replicas), spare)
    groups = search(problem, seed, moves=100)
    assert [len(group) for group in groups] == [replicas] * stages
    used = Counter(c for group in groups for c in group)
    assert all(used[c] <= size for c, size in enumerate(problem.sizes))


def test_same_seed_and_moves_same_groups():
    assert search(random_problem(1), 7, 500) == search(random_problem(1), 7, 500)


def test_more_moves_help():
    problem = random_problem(2, stages=6, replicas=4, classes=6)
    assert problem.cost_s(search(problem, 0, 2000)) < problem.cost_s(search(problem, 0, 0))


def test_it_is_never_worse_than_a_given_start():
    problem = random_problem(3)
    best = search(problem, 0, 3000)
    again = search(problem, 1, 0, starts=[best])
    assert problem.cost_s(again) == pytest.approx(problem.cost_s(best))


def test_a_deadline_stops_it_at_once():
    asked = []

    def deadline():
        asked.append(1)
        return True

    problem = random_problem(4)
    assert search(problem, 0, 10**9, deadline=deadline) == search(problem, 0, 0)
    assert len(asked) <= 3  # once for each start
