from __future__ import annotations

import os
import time

import pytest
from test_replan import QUICK, SLOW, job, machines

from ray_train_geo.cluster.topology import Topology
from ray_train_geo.planning import background
from ray_train_geo.planning.background import Question, answer, search_aside
from ray_train_geo.planning.planner import plan


def question(budget_s: float = 30.0) -> Question:
    """The plan was made for one device; by now there are three more, and fast links."""
    one = Topology(machines(1), region_links=SLOW)
    four = Topology(machines(4), region_links=QUICK)
    return Question(plan(one, job()), four, job(), 257, expected_s=3600.0, budget_s=budget_s)


def test_another_process_gives_the_same_answer() -> None:
    asked = question()
    found = search_aside(asked, lambda: False)
    here = answer(asked)
    assert found is not None
    assert found.plan.pipelines == here.plan.pipelines
    assert found.step_s == here.step_s > 2 * found.plan.predicted_step_s
    assert found.moving_s == here.moving_s > 0


def test_a_search_that_is_given_up_ends_at_once() -> None:
    began_s = time.monotonic()
    assert search_aside(question(), lambda: True) is None
    assert time.monotonic() - began_s < 5


def test_the_search_has_the_low_priority(monkeypatch: pytest.MonkeyPatch) -> None:
    lowered: list[int] = []
    monkeypatch.setattr(os, "nice", lowered.append)
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(AttributeError):  # there is no question
        background.main()
    assert lowered == [10]
