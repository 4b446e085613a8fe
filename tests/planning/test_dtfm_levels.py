from __future__ import annotations

import numpy as np
import pytest

from ray_train_geo.planning.dtfm_classes import ClassProblem
from ray_train_geo.planning.dtfm_levels import LevelModel
from ray_train_geo.planning.dtfm_sites import sites_of
from ray_train_geo.planning.dtfm_types import group_types


def solved(problem, high_s, cost_s, order=False):
    sites = sites_of(problem)
    types = group_types(problem, sites, high_s, limit=100)
    model = LevelModel(problem, sites, types, 0.0, cost_s)
    if order:
        model.add_order()
    return model.solve(5.0, None)


def test_equal_nodes_are_as_many_runs_as_it_takes():
    # Four nodes of two: each makes one run of two groups of one device, and three hops are slow.
    hop_s = np.where(np.eye(4, dtype=bool), 1.0, 5.0)
    problem = ClassProblem(8, 1, (2,) * 4, np.zeros((4, 4)), hop_s)
    result = solved(problem, 0.0, 100.0)
    assert result.finished
    assert result.lower_bound_s == pytest.approx(4 * 1.0 + 3 * 5.0)


def test_runs_are_packed_into_nodes():
    # Two runs of two groups would take blocks of 4, 2, 4 and 2 devices: 12, as many as there are,
    # but the nodes have room for 4, 4 and 2 only.  So one of the runs is cut.
    hop_s = np.where(np.eye(3, dtype=bool), 1.0, 5.0)
    problem = ClassProblem(4, 3, (5, 5, 2), np.zeros((3, 3)), hop_s)
    result = solved(problem, 0.0, 200.0)
    assert result.finished
    assert result.lower_bound_s == pytest.approx(1.0 + 5.0 + 5.0)
    assert result.groups is not None
    assert problem.cost_s(problem.ordered(result.groups)) == pytest.approx(11.0)


def test_the_order_finds_what_a_tree_of_hops_misses():
    # A star: three classes close to the centre, but far from one another.
    hop_s = np.full((4, 4), 9.0)
    hop_s[0] = hop_s[:, 0] = 1.0, 2.0, 2.1, 2.2
    sync_s = np.where(np.eye(4, dtype=bool), 1.0, 5.0)
    problem = ClassProblem(5, 2, (4, 2, 2, 2), sync_s, hop_s)
    tree, path = (solved(problem, 1.0, 200.0, order) for order in (False, True))
    assert tree.lower_bound_s == pytest.approx(1.0 + 1.0 + 2.0 + 2.1 + 2.2)
    # One of the three is neither first nor last, so the path goes there and back.
    assert path.lower_bound_s == pytest.approx(tree.lower_bound_s + 1.0)
    assert path.groups is not None
    assert path.lower_bound_s <= problem.cost_s(problem.ordered(path.groups)) + 1e-9


def test_nothing_below_the_known_cost_is_a_proof():
    hop_s = np.ones((1, 1))
    problem = ClassProblem(2, 2, (4,), hop_s, hop_s)
    result = solved(problem, 1.0, 2.0)
    assert result.finished
    assert result.groups is None
    assert result.lower_bound_s == pytest.approx(2.0)
