from __future__ import annotations

from itertools import permutations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ray_train_geo.planning.dtfm_matching import bottleneck_flow, bottleneck_matching


@st.composite
def squares(draw, most=5):
    size = draw(st.integers(1, most))
    row = st.lists(st.integers(0, 6), min_size=size, max_size=size)
    return np.array(draw(st.lists(row, min_size=size, max_size=size)), dtype=float)


@given(squares())
def test_no_permutation_has_a_lighter_heaviest_pair(weights):
    rows = range(len(weights))
    value, columns = bottleneck_matching(weights)
    assert value == min(max(weights[r, p[r]] for r in rows) for p in permutations(rows))
    assert sorted(columns) == list(rows)
    assert max(weights[r, columns[r]] for r in rows) == value


def test_an_augmenting_path_moves_a_row_that_was_matched_first():
    weights = np.array([[1.0, 2.0], [1.0, 9.0]])
    assert bottleneck_matching(weights) == (2.0, (1, 0))


@given(squares(3), st.data())
def test_a_flow_between_repeated_rows_and_columns_is_a_matching_of_all(weights, data):
    kinds = range(len(weights))
    rows = [data.draw(st.integers(1, 4)) for _ in kinds]
    columns = [rows[k] for k in data.draw(st.permutations(kinds))]
    repeated = weights.repeat(rows, axis=0).repeat(columns, axis=1)
    assert bottleneck_flow(weights, rows, columns) == bottleneck_matching(repeated)[0]
