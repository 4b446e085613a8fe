"""The plan book: one plan for all nodes alike, with the right names on it."""

from __future__ import annotations

from typing import Any

import pytest
from replay_cases import asked, fleet, small_job

from ray_train_geo.cluster.topology import Link, Topology
from ray_train_geo.errors import PlanError
from ray_train_geo.planning import planner
from ray_train_geo.planning.plan import Plan
from ray_train_geo.planning.request import request
from ray_train_geo.planning.validate import validate_plan
from ray_train_geo.replay.plan_book import PlanBook


def nodes(plan: Plan | None) -> set[str]:
    assert plan is not None
    return {d.node for d in plan.devices}


@pytest.fixture
def searches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many devices each search was for."""
    seen: list[int] = []
    real = planner.plan

    def counted(topology: Topology, *rest: Any, **more: Any) -> Plan:
        seen.append(len(topology.devices))
        return real(topology, *rest, **more)

    monkeypatch.setattr(planner, "plan", counted)
    return seen


def test_nodes_of_a_kind_share_a_plan(searches: list[int]) -> None:
    there = fleet("0+a 0+b 0+c 0+d 0+e", 9)
    made = asked(there, small_job({"pipelines": 1}, global_batch=256))
    book = PlanBook(made)
    first, second = book.best("abc"), book.best("cde")
    assert searches == [3]
    assert (nodes(first), nodes(second)) == (set("abc"), set("cde"))
    assert first is not None
    assert second is not None
    assert first.predicted_step_s == second.predicted_step_s
    for plan, names in ((first, "abc"), (second, "cde")):
        validate_plan(plan, book.topology(names), made.job, made.vocab_size)
    book.best("ab")
    assert searches == [3, 2]


def test_regions_are_kinds(searches: list[int]) -> None:
    book = PlanBook(asked(fleet("0+a 0+b 0+c 0+d", 9, regions=("Ohio", "Virginia"))))
    assert nodes(book.best("ac")) <= set("ac")
    assert nodes(book.best("bd")) <= set("bd")
    book.best("ab")
    book.best("cd")
    assert searches == [2, 2, 2], "two in Ohio, two in Virginia, one in each"


def test_nodes_with_links_of_their_own_are_kinds(searches: list[int]) -> None:
    there = fleet("0+a 0+b 0+c", 9)
    links = {("a", "b"): Link(0.001, 1e9), ("b", "a"): Link(0.001, 1e9)}
    where = Topology(there.topology.devices, node_links=links)
    book = PlanBook(request(small_job(), topology=where))
    book.best("ac")
    book.best("bc")
    assert len(searches) == 2


def test_a_shape_takes_only_what_it_needs(searches: list[int]) -> None:
    book = PlanBook(asked(fleet("0+a 0+b 0+c 0+d 0+e", 9)))
    four, also = book.shaped("abcde", 2, 2), book.shaped("bcde", 2, 2)
    assert searches == [4]
    assert four is not None
    assert also is not None
    assert [len(p.stages) for p in also.pipelines] == [2, 2]
    assert nodes(also) == set("bcde")
    assert book.shaped("abc", 2, 2) is None


def test_no_plan() -> None:
    book = PlanBook(asked(fleet("0+a 0+b", 9), small_job({"stages": 2})))
    assert book.best("a") is None
    assert book.best("") is None
    with pytest.raises(PlanError, match="too few devices"):
        book.check("a")
    book.check("ab")
