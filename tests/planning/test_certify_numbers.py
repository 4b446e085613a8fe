from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from ray_train_geo.planning.certify_numbers import Numbers, OutOfTimeError, least_over_all


def ranges(cuts):
    return [Numbers(1.0, (a + 1, b), "allreduce") for a, b in pairwise(cuts)]


def bound_of(exact):
    """The bound of a range is its least number's, less what the range is long."""

    def least_s(numbers, limit_s):
        fewest, most = numbers.pipelines
        found = min(exact[fewest - 1 : most]) * 0.99 ** (most - fewest)
        return min(limit_s, max(numbers.at_least_s, found))

    return least_s


@given(st.lists(st.floats(1.0, 9.0), min_size=1, max_size=40), st.floats(0.5, 12.0))
def test_the_least_of_all_numbers_is_found(exact, enough_s):
    asked = ranges(sorted({0, len(exact) // 3, len(exact)}))
    found_s, complete = least_over_all(asked, bound_of(exact), enough_s)
    assert complete
    assert found_s == min(enough_s, *exact) or enough_s <= found_s == 1.0


def test_what_is_known_when_time_is_up():
    left = [3]

    def least_s(numbers, limit_s):
        left[0] -= 1
        if left[0] < 0:
            raise OutOfTimeError
        return min(limit_s, 2.0 + numbers.pipelines[0])

    assert least_over_all(ranges([0, 8, 16, 24]), least_s, 50.0) == (3.0, False)
    left[0] = 2
    assert least_over_all(ranges([0, 8, 16, 24]), least_s, 50.0) == (1.0, False)
