from __future__ import annotations

from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_train_geo.planning.partition import even, weighted


@pytest.mark.parametrize(
    ("layers", "stages", "boundaries"),
    [(8, 2, (0, 4, 8)), (10, 4, (0, 3, 6, 8, 10)), (3, 3, (0, 1, 2, 3)), (5, 1, (0, 5))],
)
def test_even(layers, stages, boundaries):
    assert even(layers, stages) == boundaries


@pytest.mark.parametrize(("layers", "stages"), [(3, 4), (3, 0)])
def test_even_refuses_stages_without_layers(layers, stages):
    with pytest.raises(ValueError, match="at least one layer"):
        even(layers, stages)


@given(st.integers(1, 40), st.data())
def test_weighted_is_even_when_all_is_equal(layers, data):
    stages = data.draw(st.integers(1, layers))
    assert weighted([0.1] * layers, [3.0] * stages) == even(layers, stages)


def test_a_fast_device_gets_more_layers():
    assert weighted([1.0] * 8, [3.0, 1.0]) == (0, 6, 8)


def test_a_heavy_head_takes_layers_from_the_last_stage():
    assert weighted([1.0] * 7 + [4.0], [1.0, 1.0]) == (0, 5, 8)


def test_memory_limits_layers():
    assert weighted([1.0] * 8, [1.0] * 3, [2, 8, 8]) == (0, 2, 5, 8)
    assert weighted([1.0] * 8, [1.0] * 3, [2, 2, 3]) is None
    assert weighted([1.0] * 8, [1.0] * 3, [0, 8, 8]) is None


@given(st.data())
def test_weighted_is_optimal(data):
    layers = data.draw(st.integers(1, 7))
    stages = data.draw(st.integers(1, layers))
    costs = data.draw(st.lists(st.integers(1, 5), min_size=layers, max_size=layers))
    speeds = data.draw(st.lists(st.integers(1, 4), min_size=stages, max_size=stages))
    limits = data.draw(st.lists(st.integers(1, layers), min_size=stages, max_size=stages))

    def judge(cut):
        runs = list(pairwise(cut))
        slowest = max(sum(costs[a:b]) / v for (a, b), v in zip(runs, speeds, strict=True))
        return round(slowest, 9), sum((b - a) ** 2 for a, b in runs)

    cuts = [(0, *inner, layers) for inner in combinations(range(1, layers), stages - 1)]
    allowed = [
        cut
        for cut in cuts
        if all(b - a <= most for (a, b), most in zip(pairwise(cut), limits, strict=True))
    ]
    found = weighted(costs, speeds, limits)
    if allowed:
        assert found in allowed
        assert judge(found) == min(map(judge, allowed))
    else:
        assert found is None
