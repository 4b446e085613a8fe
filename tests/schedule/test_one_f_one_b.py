from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_train_geo.schedule.actions import Action
from ray_train_geo.schedule.gpipe import gpipe
from ray_train_geo.schedule.one_f_one_b import one_f_one_b, validate, warmup_forwards
from ray_train_geo.schedule.timeline import Hop, timeline


def picture(actions, hop_s=0.0):
    stages = len(actions)
    hops = [Hop(hop_s, 0.0)] * (stages - 1)
    run = timeline(actions, [1.0] * stages, [1.0] * stages, hops, hops)
    return run.ascii(round(run.makespan_s)).split()


def test_picture_of_the_usual_warmup():
    assert picture(one_f_one_b([3, 2, 1, 0], 4)) == [
        "0123...a.b.c.d",
        ".012..a3b.c.d.",
        "..01.a2b3c.d..",
        "...0a1b2c3d...",
    ]


def test_picture_in_steady_state():
    assert picture(one_f_one_b([1, 0], 6)) == [
        "01.a2b3c4d5e.f",
        ".0a1b2c3d4e5f.",
    ]


def test_picture_of_what_extra_warmup_buys_on_a_slow_hop():
    # One slot of latency: with the usual warmup, stage 1 idles for a round trip in the middle.
    assert picture(one_f_one_b([1, 0], 4), hop_s=1.0) == [
        "01...a2b3..c.d",
        "..0a1b..2c3d..",
    ]
    assert picture(one_f_one_b([2, 0], 4), hop_s=1.0) == [
        "012..a3b.c.d",
        "..0a1b2c3d..",
    ]


def test_large_warmup_is_gpipe():
    assert one_f_one_b([9, 5, 4], 5) == gpipe(3, 5)


@pytest.mark.parametrize("warmup", [[0, 1], [2, -1], []])
def test_refuses_warmup_that_would_deadlock(warmup):
    with pytest.raises(ValueError, match=r"warmup|needs stages"):
        one_f_one_b(warmup, 4)


def test_growing_warmup_does_deadlock():
    # What the refusal above is for: the same actions, put together by hand.
    first, second = one_f_one_b([0], 2)[0], one_f_one_b([1], 2)[0]
    with pytest.raises(ValueError, match="deadlocks: stage 0 waits at B0, stage 1 waits at F1"):
        validate([first, second])


@given(
    st.lists(st.integers(0, 12), min_size=1, max_size=8).map(lambda w: sorted(w, reverse=True)),
    st.integers(1, 20),
)
def test_never_deadlocks_and_holds_no_more_than_warmup_plus_one(warmup, microbatches):
    actions = one_f_one_b(warmup, microbatches)
    validate(actions)
    stages = len(warmup)
    hops = [Hop(0.5, 0.25)] * (stages - 1)
    run = timeline(actions, [1.0] * stages, [2.0] * stages, hops, hops)
    for s, w in enumerate(warmup):
        assert run.peak_in_flight(s) == min(w + 1, microbatches)


@given(st.data())
def test_warmup_is_always_allowed_and_within_memory(data):
    stages = data.draw(st.integers(1, 8))
    microbatches = data.draw(st.integers(1, 20))
    seconds = st.floats(0.001, 1.0)
    room = data.draw(st.lists(st.integers(1, 10), min_size=stages, max_size=stages))
    warmup = warmup_forwards(
        stages,
        microbatches,
        data.draw(st.lists(st.floats(0, 10), min_size=stages - 1, max_size=stages - 1)),
        data.draw(st.lists(seconds, min_size=stages, max_size=stages)),
        data.draw(st.lists(seconds, min_size=stages, max_size=stages)),
        room,
        data.draw(st.none() | st.integers(0, 5)),
    )
    validate(one_f_one_b(warmup, microbatches))
    assert all(w + 1 <= min(r, microbatches) for w, r in zip(warmup, room, strict=True))


def warmups(hop_s, *, room=99, extra=None, microbatches=16, stages=4):
    return warmup_forwards(
        stages,
        microbatches,
        [hop_s] * (stages - 1),
        [0.01] * stages,
        [0.02] * stages,
        [room] * stages,
        extra,
    )


def test_warmup_without_latency_is_the_usual_one():
    assert warmups(0.0) == [3, 2, 1, 0]
    assert warmups(0.0001) == [3, 2, 1, 0]  # a round trip of under 1% of a period


def test_warmup_covers_round_trips():
    assert warmups(0.02) == [9, 6, 3, 0]  # 40 ms take two periods of 30 ms per hop
    assert warmups(0.015) == [6, 4, 2, 0]  # exactly one


def test_warmup_covers_only_the_hops_downstream():
    warmup = warmup_forwards(3, 16, [0.02, 0.0], [0.01] * 3, [0.02] * 3, [99] * 3)
    assert warmup == [4, 1, 0]


def test_warmup_is_limited_by_memory_microbatches_and_wish():
    assert warmups(0.02, room=5) == [4, 4, 3, 0]
    assert warmups(0.02, microbatches=4) == [3, 3, 3, 0]
    assert warmups(0.02, extra=0) == [3, 2, 1, 0]
    assert warmups(0.0, extra=1) == [6, 4, 2, 0]
    # Little room at the first stage limits those after it too.
    assert warmup_forwards(3, 16, [0.02] * 2, [0.01] * 3, [0.02] * 3, [2, 99, 99]) == [1, 1, 0]


@pytest.mark.parametrize(
    ("hop_s", "room"), [([0.1], [1, 1, 1]), ([0.1, 0.1], [1, 1]), ([0.1, 0.1], [1, 0, 1])]
)
def test_warmup_refuses_wrong_input(hop_s, room):
    with pytest.raises(ValueError, match="stage"):
        warmup_forwards(3, 4, hop_s, [1.0] * 3, [1.0] * 3, room)


@pytest.mark.parametrize(
    "actions",
    [
        [[Action("F", 0), Action("B", 0), Action("F", 1)]],
        [[Action("F", 0), Action("F", 0), Action("B", 0), Action("B", 1)]],
        [[Action("F", 0), Action("B", 0)], [Action("F", 1), Action("B", 1)]],
    ],
)
def test_validate_finds_missing_and_repeated_actions(actions):
    with pytest.raises(ValueError, match="must occur once"):
        validate(actions)


def test_validate_finds_backward_before_forward():
    with pytest.raises(ValueError, match="deadlocks: stage 0 waits at B0"):
        validate([[Action("B", 0), Action("F", 0)]])
