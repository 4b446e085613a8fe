"""The ledger: steps by division, what is lost, and that nothing gets lost in counting."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from replay_cases import fleet

from ray_train_geo.replay.ledger import Ledger, Span


def ledger(end_s: float = 100.0) -> Ledger:
    return Ledger(fleet("0+a 0+b", end_s))


def test_whole_steps_commit_and_the_last_is_cut_off() -> None:
    span = Span("training", 10.0, 45.0, devices=2, step_s=10.0)
    assert (span.steps, span.productive_s, span.lost_s, span.cut_off) == (3, 30.0, 5.0, True)


def test_a_span_that_ends_with_a_step_loses_nothing() -> None:
    # 3 * 0.1 is more than 0.3 in floats
    span = Span("training", 0.3, 0.3 + 3 * 0.1, devices=1, step_s=0.1)
    assert span.steps == 3
    assert not span.cut_off
    assert span.lost_s == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize(
    ("end_s", "steps", "unsaved", "saving_s", "cut_off"),
    [
        (9.0, 0, 0, 0.0, True),  # in the first step
        (25.0, 2, 2, 0.0, True),
        (33.0, 3, 3, 3.0, False),  # in the checkpoint, which is not complete
        (35.0, 3, 0, 5.0, False),
        (46.0, 4, 1, 5.0, True),
        (70.0, 6, 0, 10.0, False),
    ],
)
def test_checkpoints_stop_training(
    end_s: float, steps: int, unsaved: int, saving_s: float, cut_off: bool
) -> None:
    span = Span("training", 0.0, end_s, 1, step_s=10.0, steps_per_save=3, save_s=5.0)
    assert (span.steps, span.unsaved, span.saving_s) == (steps, unsaved, saving_s)
    assert span.cut_off == cut_off
    assert span.productive_s + span.lost_s + span.saving_s == pytest.approx(end_s)


def test_a_stop_may_take_the_steps_since_the_checkpoint_along() -> None:
    found = ledger()
    found.train(0.0, 2, 10.0, steps_per_save=3, save_s=5.0)
    found.stop(58.0, to_checkpoint=True)
    found.end(100.0)
    training, stopped = found.spans
    assert (training.steps, training.undone) == (3, 2)
    assert training.lost_s == pytest.approx(58.0 - 5.0 - 30.0)
    assert (stopped.kind, stopped.seconds) == ("stopped", 42.0)


def test_rolled_back_over_several_spans() -> None:
    found = ledger()
    found.train(0.0, 2, 10.0)
    found.train(30.0, 2, 5.0)  # at the end of a step: nothing is lost
    found.stop(42.0)
    found.roll_back(3)
    found.end(50.0)
    assert [(s.kind, s.steps, s.undone) for s in found.spans if s.kind == "training"] == [
        ("training", 2, 1),
        ("training", 0, 2),
    ]
    assert found.committed_by(50.0) == 2
    assert found.committed_by(10.0) == 1


def test_when_a_step_or_a_checkpoint_is_complete() -> None:
    found = ledger()
    found.train(7.0, 2, 10.0, steps_per_save=2, save_s=1.0)
    assert found.step_end(7.0) == 7.0
    assert found.step_end(8.0) == 17.0
    assert found.step_end(17.0) == 17.0
    assert found.save_end(7.0) == 28.0
    assert found.save_end(29.0) == 49.0


def test_moments_without_length_leave_no_trace() -> None:
    found = ledger()
    found.stop(0.0)
    found.train(0.0, 2, 10.0)
    found.stop(20.0)
    found.wait(20.0)
    found.end(100.0)
    assert [(s.kind, s.start_s, s.end_s) for s in found.spans] == [
        ("training", 0.0, 20.0),
        ("waiting", 20.0, 100.0),
    ]


@given(
    st.floats(1e-3, 1e3),
    st.floats(0, 1e5),
    st.integers(0, 5000),
    st.integers(0, 7),
    st.floats(0, 10),
)
def test_seconds_are_all_accounted_for(
    step_s: float, start_s: float, steps: int, per_save: int, save_s: float
) -> None:
    end_s = start_s + (steps + 0.5) * step_s
    span = Span("training", start_s, end_s, 3, step_s, per_save, save_s)
    parts = span.productive_s, span.lost_s, span.saving_s
    assert min(parts) >= 0
    assert math.isclose(sum(parts), span.seconds, rel_tol=1e-6, abs_tol=1e-6)
    assert 0 <= span.unsaved <= span.steps <= steps + 1
    if not per_save:
        assert span.steps == steps
