"""How a spot trace becomes minutes on a few nodes."""

from __future__ import annotations

import math

import pytest

from ray_train_geo.chaos.spot import followed, longest_notice_s, nodes_at_first
from ray_train_geo.cluster.traces import SpotTrace, TraceEvent, load_trace
from ray_train_geo.errors import InputError

TRACE = SpotTrace(
    "t",
    (
        TraceEvent(3600, "add", "a"),
        TraceEvent(3600, "add", "b"),
        TraceEvent(7200, "remove", "a"),
        TraceEvent(9000, "add", "c"),
    ),
    10_800,
)


def test_it_begins_with_the_first_node_and_runs_faster() -> None:
    found = followed(TRACE, speedup=60, max_nodes=8)
    assert [(e.time_s, e.op, e.node) for e in found.events] == [
        *((0, "add", "a"), (0, "add", "b"), (60, "remove", "a"), (90, "add", "c"))
    ]
    assert found.end_s == 120
    assert nodes_at_first(found) == ["a", "b"]
    assert longest_notice_s(found) is None


def test_hours_are_the_traces_and_notices_the_runs() -> None:
    found = followed(TRACE, speedup=60, max_nodes=8, until_h=2.25, notice_s=20)
    assert [(e.time_s, e.op) for e in found.events[2:]] == [(40, "notice"), (60, "remove")]
    assert found.end_s == 75
    assert longest_notice_s(found) == 20


def test_eight_nodes_of_the_aws_trace() -> None:
    found = followed(load_trace("aws-p3"), speedup=24, max_nodes=8, until_h=2.7)
    there, most = set(nodes_at_first(found)), 0
    for e in found.events:
        there = there | {e.node} if e.op == "add" else there - {e.node}
        most = max(most, len(there))
    assert most == 8
    assert found.end_s == pytest.approx(405)
    assert sum(e.op == "remove" for e in found.events) >= 10


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"speedup": 0.0}, "--speedup is 0: give a number above 0"),
        ({"speedup": math.nan}, "--speedup is nan"),
        ({"until_h": -1.0}, "--until-h is -1"),
        ({"notice_s": math.inf}, "--notice-s is inf"),
        ({"until_h": 0.5}, "none of 8 nodes is up by then"),
    ],
)
def test_refused(options: dict[str, float], says: str) -> None:
    with pytest.raises(InputError) as e:
        followed(TRACE, **{"speedup": 60.0, "max_nodes": 8, **options})
    assert says in str(e.value)


def test_a_trace_without_a_length() -> None:
    with pytest.raises(InputError, match="ends when it begins; say --until-h"):
        followed(SpotTrace("t", (TraceEvent(5, "add", "a"),), 5), speedup=1, max_nodes=1)
