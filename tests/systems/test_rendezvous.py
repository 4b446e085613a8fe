"""1F1B of neighbours that meet: by hand, and against bounds."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_train_geo.systems.rendezvous import Exchange, makespan_s


def test_one_stage_only_computes():
    assert makespan_s([1.0], [2.0], [], 4) == 12.0


def test_without_messages_equal_passes_lose_nothing_but_fill_and_drain():
    free = [Exchange(0.0, 0.0)] * 3
    assert makespan_s([1.0] * 4, [1.0] * 4, free, 8) == (8 + 3) * 2.0


def test_unequal_passes_wait_for_each_other():
    # s0: F0 0-1, meets, F1 1-2, waits until B0 of s1 is done at 5, ...
    assert makespan_s([1.0, 1.0], [3.0, 3.0], [Exchange(0.0, 0.0)], 2) == 12.0


def test_both_directions_go_at_once_and_latency_is_waited_for():
    # s0 F0 0-1 | sent 1-3, there at 4 | s1 F0 4-5, B0 5-6; s0 F1 3-4, waits, meets at 6: both have
    # theirs at 9 | s0 B0 9-10; s1 F1 9-10, B1 10-11 | sent 11-13, there at 14 | s0 B1 14-15
    assert makespan_s([1.0] * 2, [1.0] * 2, [Exchange(2.0, 1.0)], 2) == 15.0


@given(
    st.integers(1, 5).flatmap(
        lambda n: st.tuples(
            st.lists(st.floats(0.1, 3), min_size=n, max_size=n),
            st.lists(st.floats(0.1, 3), min_size=n, max_size=n),
            st.lists(
                st.builds(Exchange, st.floats(0, 2), st.floats(0, 2)),
                min_size=n - 1,
                max_size=n - 1,
            ),
        )
    ),
    st.integers(1, 7),
)
def test_never_below_what_must_be_done(stages, microbatches):
    forward, backward, hops = stages
    found = makespan_s(forward, backward, hops, microbatches)
    for s in range(len(forward)):
        assert found >= microbatches * (forward[s] + backward[s]) - 1e-9
    once = sum(forward) + sum(backward) + 2 * sum(h.transfer_s + h.latency_s for h in hops)
    assert found >= once - 1e-9
    more = [Exchange(h.transfer_s + 0.5, h.latency_s) for h in hops]
    assert makespan_s(forward, backward, more, microbatches) >= found - 1e-9


def test_refuses_lengths_that_do_not_match():
    with pytest.raises(ValueError, match="stages - 1 hops"):
        makespan_s([1.0, 1.0], [1.0], [], 1)
    with pytest.raises(ValueError, match="a microbatch"):
        makespan_s([1.0], [1.0], [], 0)
