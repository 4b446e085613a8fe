from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_train_geo.planning.warmup import StageTimes, choose_warmup
from ray_train_geo.schedule.one_f_one_b import one_f_one_b
from ray_train_geo.schedule.timeline import Hop, timeline


def times(forward, backward, down, up=None):
    hops = [tuple(Hop(*h) for h in way) for way in (down, down if up is None else up)]
    return StageTimes(tuple(forward), tuple(backward), *hops)


def makespan_s(t, warmup, microbatches):
    actions = one_f_one_b(warmup, microbatches)
    return timeline(actions, t.forward_s, t.backward_s, t.down, t.up).makespan_s


def test_heads_tails_and_the_round():
    t = times([1, 2, 3], [2, 4, 6], [(0.5, 0.25), (0.5, 0.5)], [(1, 1), (2, 2)])
    assert t.head_s == [0, 1.75, 4.75]
    assert t.tail_s == [0, 4, 12]
    assert t.round_s == 4.75 + 3 + 12 + 6
    assert t.below_s == [25.75 - 3, 25.75 - 5.75 - 6, 0]


def test_nothing_is_faster_than_what_feeds_it():
    t = times([1, 2, 1], [3, 1, 1], [(0, 0.5), (0, 4)], [(0, 5), (0, 0.5)])
    assert t.paces_s == [(1, 5), (2, 1), (4, 1)]


def test_near_equal_stages_want_the_usual_warmup():
    assert choose_warmup(times([1] * 4, [2] * 4, [(0, 0)] * 3), 20, [20] * 4, None) == (3, 2, 1, 0)


def test_a_far_bottleneck_wants_more_than_its_steady_state():
    # The first gradient comes after 21.5 s: 7 warmup forwards keep the steady state busy, but at
    # 1 s each they leave the stage idle at first.
    t = times([1, 0.5], [2, 1], [(10, 0)])
    usual = (8, 0)
    wanted = choose_warmup(t, 60, [60, 60], None)
    assert wanted == (22, 0)
    assert makespan_s(t, wanted, 60) == 60 * 3
    assert makespan_s(t, usual, 60) > 60 * 3 + 12


def test_another_stages_work_hides_idle_time():
    t = times([1, 1], [2, 2], [(10, 0)])
    assert choose_warmup(t, 60, [60, 60], None) == (8, 0)
    assert makespan_s(t, (8, 0), 60) == pytest.approx(makespan_s(t, (30, 0), 60))


def test_memory_limits_and_warmup_still_falls():
    t = times([1] * 4, [2] * 4, [(4, 0)] * 3)
    limited = choose_warmup(t, 60, [4, 60, 60, 60], None)
    assert limited == (3, 2, 1, 0)


def test_extra_is_taken_as_given():
    t = times([1, 1, 1], [2, 2, 2], [(10, 0)] * 2)
    assert choose_warmup(t, 60, [60] * 3, 1) == (4, 2, 0)


TIMES = st.integers(1, 4).flatmap(
    lambda n: st.tuples(
        st.lists(st.floats(0.1, 3), min_size=n, max_size=n),
        st.lists(st.floats(0.1, 6), min_size=n, max_size=n),
        st.lists(st.tuples(st.floats(0, 9), st.floats(0, 4)), min_size=n - 1, max_size=n - 1),
    )
)


@settings(deadline=None)
@given(TIMES, st.integers(1, 40))
def test_no_idle_time_means_no_gain_from_more(given_times, microbatches):
    t = times(*given_times)
    stages = len(t.forward_s)
    free = choose_warmup(t, microbatches, [microbatches] * stages, None)
    assert all(a >= b for a, b in itertools.pairwise(free))
    assert max(free) < microbatches
    found = makespan_s(t, free, microbatches)
    # Never below what any single stage or hop needs, and near the best of them.
    bounds = [
        h + w + microbatches * (f + b)
        for h, w, f, b in zip(t.head_s, t.tail_s, t.forward_s, t.backward_s, strict=True)
    ]
    bounds += [t.round_s + (microbatches - 1) * hop.transfer_s for hop in (*t.down, *t.up)]
    assert max(bounds) <= found * (1 + 1e-9)
    assert found <= 2 * max(bounds)
