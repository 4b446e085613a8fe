from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_train_geo.planning.dtfm_order import path_length, shortest_path


@given(st.integers(0, 10_000), st.integers(1, 6))
def test_it_is_the_shortest_of_all_orders(seed, count):
    weights = np.random.default_rng(seed).integers(0, 9, (count, count)).astype(float)
    weights += weights.T
    order = shortest_path(weights)
    assert sorted(order) == list(range(count))
    best = min(path_length(weights, p) for p in permutations(range(count)))
    assert path_length(weights, order) == best


@pytest.mark.parametrize("count", [12, 40])
def test_points_on_a_line_are_visited_along_it(count):
    points = np.random.default_rng(3).permutation(count).astype(float)
    weights = abs(points[:, None] - points[None, :])
    assert path_length(weights, shortest_path(weights)) == count - 1
