from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from ray_train_geo.planning.microbatches import makespan_s, split_microbatches

LINES = st.lists(st.tuples(st.floats(0, 5), st.floats(0.01, 10)), min_size=1, max_size=3)


def slowest_s(lines, counts):
    return max(makespan_s(ls, n) for ls, n in zip(lines, counts, strict=True))


def test_a_makespan_is_its_highest_line():
    lines = [(3.0, 1.0), (0.0, 2.0)]
    assert [makespan_s(lines, m) for m in (1, 3, 5)] == [4.0, 6.0, 10.0]


def test_equal_pipelines_share_equally_and_the_first_take_what_is_left():
    assert split_microbatches(11, [[(0.0, 1.0)]] * 3) == (4, 4, 3)


def test_twice_as_fast_gets_twice_as_many():
    assert split_microbatches(9, [[(0.0, 1.0)], [(0.0, 2.0)]]) == (6, 3)


def test_a_long_fill_costs_microbatches():
    assert split_microbatches(10, [[(0.0, 1.0)], [(4.0, 1.0)]]) == (7, 3)


def test_memory_caps_a_share():
    assert split_microbatches(10, [[(0.0, 1.0)]] * 2, [2, 10]) == (2, 8)
    assert split_microbatches(10, [[(0.0, 1.0)]] * 2, [2, 7]) is None
    assert split_microbatches(10, [[(0.0, 1.0)]] * 2, [0, 10]) is None


def test_too_few_for_all():
    assert split_microbatches(1, [[(0.0, 1.0)]] * 2) is None


@given(st.lists(LINES, min_size=1, max_size=3), st.integers(0, 9))
def test_no_other_split_is_faster(lines, more):
    total = len(lines) + more
    found = split_microbatches(total, lines)
    assert sum(found) == total
    assert min(found) >= 1
    every = (
        counts
        for counts in itertools.product(range(1, total + 1), repeat=len(lines))
        if sum(counts) == total
    )
    best = min(slowest_s(lines, counts) for counts in every)
    assert slowest_s(lines, found) <= best * (1 + 1e-9)
