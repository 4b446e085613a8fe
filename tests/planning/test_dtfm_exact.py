from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_train_geo.planning.dtfm_classes import ClassProblem
from ray_train_geo.planning.dtfm_exact import minimum
from ray_train_geo.planning.dtfm_search import search


def all_placements(problem):
    """Every ordered choice of groups, by class."""

    def choose(left, stages):
        if not stages:
            yield ()
            return
        for group in sorted(set(combinations(left, problem.replicas))):
            rest = list(left)
            for c in group:
                rest.remove(c)
            for others in choose(tuple(rest), stages - 1):
                yield group, *others

    yield from choose(
        tuple(c for c, n in enumerate(problem.sizes) for _ in range(n)), problem.stages
    )


@st.composite
def problems(draw):
    stages, replicas = draw(st.sampled_from([(2, 2), (2, 3), (3, 2), (1, 3), (4, 1)]))
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    sizes[0] += max(0, stages * replicas - sum(sizes))
    random = np.random.default_rng(draw(st.integers(0, 1000)))
    kinds = draw(st.integers(2, 6))  # few values: ties, and classes that can be exchanged
    matrices = []
    for _ in range(2):
        values = random.integers(1, kinds, (len(sizes), len(sizes))) / 7.0
        values += values.T
        alone = np.array(sizes) == 1
        values[alone, alone] = 0.0
        matrices.append(values)
    return ClassProblem(stages, replicas, tuple(sizes), *matrices)


@st.composite
def nodes_in_regions(draw):
    """Nodes of a few sizes in up to three regions: sites of several classes, and families."""
    stages, replicas = draw(st.sampled_from([(2, 2), (2, 3), (3, 2), (4, 1), (2, 4), (4, 2)]))
    nodes = draw(st.lists(st.tuples(st.integers(0, 2), st.sampled_from([1, 2, 4])), max_size=4))
    nodes.append((0, max(1, stages * replicas - sum(size for _, size in nodes))))
    regions = np.array([region for region, _ in nodes])
    random = np.random.default_rng(draw(st.integers(0, 1000)))
    sizes = tuple(size for _, size in nodes)
    matrices = []
    for _ in range(2):
        across = random.integers(4, 8, (3, 3)) / 3.0
        np.fill_diagonal(across, random.integers(2, 4, 3) / 3.0)
        costs = (across + across.T)[np.ix_(regions, regions)]
        own = random.integers(1, 6, 3)[regions] / 3.0  # sometimes slower than between nodes
        np.fill_diagonal(costs, np.where(np.array(sizes) > 1, own, 0.0))
        matrices.append(costs)
    return ClassProblem(stages, replicas, sizes, *matrices)


def test_a_replica_alone_sums_nothing_and_still_has_a_best_path():
    hop_s = np.array([[4, 8, 6, 4], [8, 0, 8, 5], [6, 8, 0, 3], [4, 5, 3, 6]]) / 7
    problem = ClassProblem(4, 1, (2, 1, 1, 3), np.ones((4, 4)), hop_s)
    assert minimum(problem, 11 / 7, effort=10.0).cost_s == pytest.approx(10 / 7)


@settings(max_examples=40)
@given(st.one_of(problems(), nodes_in_regions()))
def test_the_minimum_is_that_of_all_placements(problem):
    best = min(map(problem.cost_s, all_placements(problem)))
    start = search(problem, seed=0, moves=20)
    found = minimum(problem, problem.cost_s(start), effort=10.0)
    assert found.proven
    assert found.cost_s == pytest.approx(best, rel=1e-12)
    assert found.groups is None or problem.cost_s(found.groups) == found.cost_s


@given(problems(), st.data())
def test_merging_classes_and_simple_bounds_never_overestimate(problem, data):
    names = [data.draw(st.integers(0, 2)) for _ in problem.sizes]
    label = [sorted(set(names)).index(name) for name in names]
    merged = problem.merged(label)
    groups = search(problem, seed=0, moves=20)
    coarse = [tuple(sorted(label[c] for c in group)) for group in groups]
    cost_s = problem.cost_s(groups)
    assert merged.cost_s(coarse) <= cost_s + 1e-12
    hops_s = (problem.stages - 1) * problem.least_hop_s()
    assert problem.least_data_parallel_s() + hops_s <= cost_s + 1e-12


def test_without_effort_the_bound_is_simple_and_nothing_is_proven():
    costs = np.array([[1.0, 3.0], [3.0, 1.0]])
    problem = ClassProblem(2, 2, (3, 1), costs, costs)
    found = minimum(problem, 7.0, effort=0.0)
    assert not found.proven
    assert found.groups is None
    assert found.lower_bound_s == 2.0
    assert minimum(problem, 7.0, math.inf, deadline=lambda: True) == found
