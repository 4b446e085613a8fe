"""What policies cost can be overridden by name, and only so."""

from __future__ import annotations

import pytest

from ray_train_geo.errors import SpecError
from ray_train_geo.replay.assumptions import Assumptions, assumptions


def test_the_measured_ones() -> None:
    found = assumptions()
    assert found == Assumptions()
    assert found.torchft_like.failure_s == 5.0
    assert (found.restart.replaced_s, found.restart.shrunk_s) == (31.0, 65.0)
    assert found.checkpoint_restart.detect_s == 13.5


def test_overrides() -> None:
    found = assumptions(["ours.detect_s=0.5", "torchft-like.failure_s=1", "ours.plan_s=0"])
    assert (found.ours.detect_s, found.ours.plan_s, found.torchft_like.failure_s) == (0.5, 0, 1)
    assert found.restart == Assumptions().restart


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("ours.detect_s", "no assumption 'ours.detect_s': give NAME=VALUE, NAME of ours.detect_s"),
        ("ours.speed=1", "no assumption 'ours.speed=1'"),
        ("ours.detect_s=soon", "'soon' is no number from 0 on"),
        ("ours.detect_s=-1", "'-1' is no number from 0 on"),
        ("ours.detect_s=inf", "'inf' is no number from 0 on"),
    ],
)
def test_refused(text: str, says: str) -> None:
    with pytest.raises(SpecError) as refused:
        assumptions([text])
    assert says in str(refused.value)
