"""A simulated step in the viewer: every action once, at its time, on its stage's lane."""

from __future__ import annotations

from typing import Any

import pytest

from ray_train_geo.observe.simulated_trace import simulated_trace
from ray_train_geo.schedule.gpipe import gpipe
from ray_train_geo.schedule.timeline import Hop, timeline
from ray_train_geo.schedule.zero_bubble import zero_bubble
from ray_train_geo.systems.simulated import Simulated, TracedPipeline

HOP = Hop(latency_s=0.01, transfer_s=0.02)
RUN = timeline(gpipe(2, 3), [0.1] * 2, [0.2] * 2, [HOP], [HOP])


def traced(
    *pipelines: TracedPipeline, sync_s: tuple[float, float] | None = None
) -> list[dict[str, Any]]:
    found = Simulated(
        "ours", "x", "m", 8, 4, 9.0, 1.0, 0.5, {}, 1.0, 1.0, trace=pipelines, sync_s=sync_s
    )
    events: list[dict[str, Any]] = simulated_trace(found)["traceEvents"]
    return events


def spans(events: list[dict[str, Any]], pid: int) -> list[dict[str, Any]]:
    return [e for e in events if e["ph"] == "X" and e["pid"] == pid]


def test_each_action_once_at_its_time() -> None:
    events = traced(TracedPipeline(("a", "b"), RUN))
    for stage in range(2):
        mine = spans(events, stage)
        assert [e["name"] for e in mine] == ["F0", "F1", "F2", "B0", "B1", "B2"]
        for e, start_s, end_s in zip(mine, RUN.starts_s[stage], RUN.ends_s[stage], strict=True):
            assert e["ts"] == pytest.approx(start_s * 1e6, abs=2)
            assert e["dur"] == pytest.approx((end_s - start_s) * 1e6, abs=2)
        assert {e["cat"] for e in mine} == {"forward", "backward"}


def test_rounds_go_on_where_the_last_one_ended() -> None:
    later_s = RUN.makespan_s + 1
    events = traced(TracedPipeline(("a", "b"), RUN), TracedPipeline(("a", "b"), RUN, later_s))
    assert {e["pid"] for e in events} == {0, 1}
    mine = spans(events, 0)
    assert [e["args"]["microbatch"] for e in mine if e["cat"] == "forward"] == [0, 1, 2, 3, 4, 5]
    assert mine[6]["ts"] == pytest.approx(later_s * 1e6, abs=2)


def test_pipelines_and_stages_have_names_and_sync_is_on_all() -> None:
    events = traced(
        TracedPipeline(("a", "b"), RUN), TracedPipeline(("c", "d"), RUN), sync_s=(2.0, 2.5)
    )
    names = [e["args"]["name"] for e in events if e["name"] == "process_name"]
    assert names[0] == "rank 0: pipeline 0, stage 0, device a"
    assert names[3] == "rank 3: pipeline 1, stage 1, device d"
    sync = [e for e in events if e.get("cat") == "sync"]
    assert [(e["pid"], e["ts"], e["dur"]) for e in sync] == [
        (rank, 2_000_000, 500_000) for rank in range(4)
    ]


def test_weight_gradients_are_a_kind_of_their_own() -> None:
    run = timeline(zero_bubble([1, 0], [0, 1], 2), [0.1] * 2, [0.1] * 2, [HOP], [HOP],
                   weight_s=[0.1] * 2)  # fmt: skip
    mine = spans(traced(TracedPipeline(("a", "b"), run)), 1)
    assert [e["name"] for e in mine] == ["F0", "B0", "F1", "B1", "W0", "W1"]
    assert [e["cat"] for e in mine[-2:]] == ["weights", "weights"]
