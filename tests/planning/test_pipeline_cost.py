from __future__ import annotations

from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_train_geo.planning.pipeline_cost import balanced_cut


@pytest.mark.parametrize(
    ("layer_s", "extra_s", "most", "cut"),
    [
        ([1, 1, 1], [0, 0, 0], [9, 9, 9], (0, 3, 5, 7)),
        ([1, 1, 1], [0, 0, 2.5], [9, 9, 9], (0, 3, 6, 7)),
        ([1, 2], [0, 0], [9, 9], (0, 5, 7)),
        ([1, 1], [0, 0], [2, 9], (0, 2, 7)),
        ([1, 1], [0, 0], [2, 4], None),
        ([1] * 8, [0] * 8, [9] * 8, None),
    ],
)
def test_a_balanced_cut(layer_s, extra_s, most, cut):
    assert balanced_cut(7, layer_s, extra_s, most) == cut


@given(st.data())
def test_no_other_cut_is_faster(data):
    layers = data.draw(st.integers(1, 7))
    stages = data.draw(st.integers(1, layers))

    def draw(values):
        return data.draw(st.lists(values, min_size=stages, max_size=stages))

    layer_s, extra_s = draw(st.integers(1, 5)), draw(st.integers(0, 3))
    most = draw(st.integers(1, layers))

    def slowest_s(cut):
        runs = zip(pairwise(cut), layer_s, extra_s, strict=True)
        return max((b - a) * one + extra for (a, b), one, extra in runs)

    cuts = [(0, *inner, layers) for inner in combinations(range(1, layers), stages - 1)]
    allowed = [
        cut
        for cut in cuts
        if all(b - a <= m for (a, b), m in zip(pairwise(cut), most, strict=True))
    ]
    found = balanced_cut(layers, layer_s, extra_s, most)
    if allowed:
        assert found in allowed
        assert slowest_s(found) == min(map(slowest_s, allowed))
    else:
        assert found is None
