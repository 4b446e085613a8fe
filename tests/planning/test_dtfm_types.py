from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from ray_train_geo.planning.dtfm_classes import ClassProblem
from ray_train_geo.planning.dtfm_sites import sites_of
from ray_train_geo.planning.dtfm_types import as_group, excess_between, group_types

NEAR, FAR = 1.0, 9.0
COSTS = np.array([[NEAR, NEAR, FAR], [NEAR, NEAR, FAR], [FAR, FAR, NEAR]])


def test_a_strict_limit_leaves_groups_of_close_devices():
    problem = ClassProblem(3, 2, (2, 2, 2), COSTS, COSTS)
    types = group_types(problem, sites_of(problem), NEAR, limit=10)
    assert types is not None
    assert sorted(map(as_group, types.counts)) == [(0, 0), (1, 1)]  # classes 0 and 1 are one site


def test_where_all_sites_have_one_class_types_are_the_groups_within_the_limit():
    costs = np.add.outer([1.0, 2.0, 4.0], [1.0, 2.0, 4.0])
    problem = ClassProblem(2, 3, (3, 2, 2), costs, costs)
    sites = sites_of(problem)
    types = group_types(problem, sites, 14.0, limit=100)
    assert types is not None
    devices = [c for c, size in enumerate(problem.sizes) for _ in range(size)]
    everything = {g for g in combinations(devices, 3) if problem.data_parallel_s(g) <= 14}
    assert set(map(as_group, types.counts)) == everything
    assert types.data_parallel_s() == pytest.approx(
        sorted({problem.data_parallel_s(g) for g in everything})
    )
    assert group_types(problem, sites, 14.0, limit=2) is None


def test_values_of_data_parallelism_are_those_of_all_groups():
    # Two nodes of a region, and one node elsewhere.
    sync_s = np.array([[1.0, 3.0, 7.0], [3.0, 1.0, 7.0], [7.0, 7.0, 2.0]])
    problem = ClassProblem(2, 3, (3, 2, 2), sync_s, sync_s)
    types = group_types(problem, sites_of(problem), 100.0, limit=100)
    assert types is not None
    devices = [c for c, size in enumerate(problem.sizes) for _ in range(size)]
    values = {problem.data_parallel_s(g) for g in combinations(devices, 3)}
    assert set(types.data_parallel_s().tolist()) == values


def test_hops_between_types_are_measured_from_the_fastest():
    problem = ClassProblem(3, 2, (4, 2, 2), COSTS, COSTS)
    types = np.array([[2, 0, 0], [0, 2, 0], [0, 0, 2]])
    excess_s = excess_between(problem, types, most_s=100.0)
    assert excess_s[0, 0] == excess_s[0, 1] == 0.0
    assert excess_s[0, 2] == pytest.approx(FAR - NEAR)
    assert excess_s[1, 1] == np.inf  # there is one such group only
    assert np.isinf(excess_between(problem, types, most_s=1.0)[0, 2])
