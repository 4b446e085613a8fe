from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from ray_train_geo.planning.dtfm_classes import ClassProblem
from ray_train_geo.planning.dtfm_types import as_group, excess_between, group_types

NEAR, FAR = 1.0, 9.0
COSTS = np.array([[NEAR, NEAR, FAR], [NEAR, NEAR, FAR], [FAR, FAR, NEAR]])


def test_a_strict_limit_leaves_groups_of_close_classes_up_to_orbits():
    problem = ClassProblem(3, 2, (2, 2, 2), COSTS, COSTS)
    assert problem.orbits == ((0, 1), (2,))
    types = group_types(problem, NEAR, limit=10)
    assert types is not None
    assert sorted(map(as_group, types)) == [(0, 0), (0, 1), (2, 2)]  # (1, 1) is as (0, 0)


def test_without_orbits_all_groups_within_the_limit_are_found():
    costs = np.add.outer([1.0, 2.0, 4.0], [1.0, 2.0, 4.0])
    problem = ClassProblem(2, 3, (3, 2, 2), costs, costs)
    types = group_types(problem, 14.0, limit=100)
    assert types is not None
    devices = [c for c, size in enumerate(problem.sizes) for _ in range(size)]
    everything = set(combinations(devices, 3))
    assert set(map(as_group, types)) == {g for g in everything if problem.data_parallel_s(g) <= 14}
    assert group_types(problem, 14.0, limit=2) is None


def test_hops_between_types_are_measured_from_the_fastest():
    problem = ClassProblem(3, 2, (4, 2, 2), COSTS, COSTS)
    types = np.array([[2, 0, 0], [0, 2, 0], [0, 0, 2]])
    excess_s = excess_between(problem, types, most_s=100.0)
    assert excess_s[0, 0] == excess_s[0, 1] == 0.0
    assert excess_s[0, 2] == pytest.approx(FAR - NEAR)
    assert excess_s[1, 1] == np.inf  # there is one such group only
    assert np.isinf(excess_between(problem, types, most_s=1.0)[0, 2])
