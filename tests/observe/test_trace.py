"""Spans in, well-formed Chrome trace out."""

from __future__ import annotations

import json
import threading
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_train_geo.observe.trace import Span, Tracer, chrome_trace, worker_name

T0 = 1.7e9


def check_well_formed(trace: dict[str, Any]) -> None:
    json.loads(json.dumps(trace, allow_nan=False))
    named, stacks = set(), {}
    for event in trace["traceEvents"]:
        assert event.keys() >= {"ph", "name", "pid", "tid", "args"}
        track = (event["pid"], event["tid"])
        if event["ph"] == "M":
            if event["name"] == "thread_name":
                assert track not in named
                named.add(track)
            continue
        assert event["ph"] == "X"
        assert track in named, "a span in a thread without a name"
        assert isinstance(event["ts"], int)
        assert event["ts"] >= 0
        assert event["dur"] >= 0
        assert isinstance(event["args"]["step"], int)
        start, end = event["ts"], event["ts"] + event["dur"]
        stack = stacks.setdefault(track, [(0, 2**62)])
        assert start >= stack[-1][0], "out of order"
        while stack[-1][1] <= start:
            stack.pop()
        assert end <= stack[-1][1], "overlaps without nesting"
        stack.append((start, end))


def spans_of(trace: dict[str, Any]) -> list[dict[str, Any]]:
    return [e for e in trace["traceEvents"] if e["ph"] == "X"]


def test_lanes_names_and_times() -> None:
    trace = chrome_trace(
        {
            1: (
                worker_name(1, 0, 1, (2, 4), "X"),
                [
                    Span("receive", "F0", T0 + 0.5, 0.25, 7, 0),
                    Span("forward", "F0", T0 + 0.75, 0.5, 7, 0),
                    Span("optimizer", "step", T0 + 2, 0.125, 7),
                ],
            ),
            0: (worker_name(0, 0, 0, (0, 1), "Y"), [Span("forward", "F0", T0, 0.5, 7, 0)]),
        }
    )
    check_well_formed(trace)
    processes = {
        e["pid"]: e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "process_name"
    }
    assert processes == {
        0: "rank 0: pipeline 0, stage 0, layer 0, node Y",
        1: "rank 1: pipeline 0, stage 1, layers 2-3, node X",
    }
    threads = {
        e["tid"]: e["args"]["name"]
        for e in trace["traceEvents"]
        if e["name"] == "thread_name" and e["pid"] == 1
    }
    assert sorted(threads.values()) == ["compute", "receive", "send", "sync"]
    got = [
        (e["pid"], threads[e["tid"]], e["cat"], e["ts"], e["dur"], e["args"])
        for e in spans_of(trace)
    ]
    assert got == [
        (0, "compute", "forward", 0, 500_000, {"step": 7, "microbatch": 0}),
        (1, "compute", "forward", 750_000, 500_000, {"step": 7, "microbatch": 0}),
        (1, "compute", "optimizer", 2_000_000, 125_000, {"step": 7}),
        (1, "receive", "receive", 500_000, 250_000, {"step": 7, "microbatch": 0}),
    ]


def test_overlapping_sends_get_threads_of_their_own() -> None:
    sends = [Span("send", f"F{i}", T0 + i, 1.5, 0, i) for i in range(4)]
    trace = chrome_trace({0: ("w", sends)})
    check_well_formed(trace)
    names = [e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "thread_name"]
    assert names == ["compute", "receive", "send", "send 2", "sync"]


def test_no_spans_is_a_trace_too() -> None:
    check_well_formed(chrome_trace({}))
    check_well_formed(chrome_trace({0: ("idle", [])}))


@given(
    st.lists(
        st.builds(
            Span,
            category=st.sampled_from(["forward", "send"]),
            name=st.just("s"),
            start_s=st.floats(T0, T0 + 1e-4),
            duration_s=st.floats(0, 5e-5),
            step=st.just(0),
            microbatch=st.none() | st.integers(0, 3),
        ),
        max_size=30,
    )
)
def test_any_spans_give_a_well_formed_trace(spans: list[Span]) -> None:
    trace = chrome_trace({0: ("w", spans)})
    check_well_formed(trace)
    assert len(spans_of(trace)) == len(spans)


@given(st.lists(st.floats(1e-5, 1e-3), min_size=1, max_size=50))
def test_spans_one_behind_the_other_stay_in_one_thread(durations: list[float]) -> None:
    spans, clock = [], 12.3
    for d in durations:
        spans.append(Span("forward", "F", T0 + clock, d, 0))
        clock += d
    trace = chrome_trace({0: ("w", spans)})
    check_well_formed(trace)
    assert {e["tid"] for e in spans_of(trace)} == {0}


def test_tracer_times_in_unix_seconds_also_when_the_work_raises() -> None:
    tracer = Tracer()
    before = time.time()
    with tracer.span("forward", "F0", 3, 0):
        time.sleep(0.02)
    with pytest.raises(ValueError, match="boom"), tracer.span("backward", "B0", 3, 0):
        raise ValueError("boom")
    forward, backward = tracer.drain()
    assert tracer.drain() == []
    assert (forward.category, forward.name, forward.step, forward.microbatch) == (
        "forward",
        "F0",
        3,
        0,
    )
    assert before - 0.01 <= forward.start_s <= time.time()
    assert 0.02 <= forward.duration_s < 1
    assert backward.start_s >= forward.start_s + forward.duration_s - 1e-6


def test_tracer_off_records_nothing() -> None:
    tracer = Tracer(enabled=False)
    with tracer.span("forward", "F0", 0, 0):
        pass
    tracer.add(Span("forward", "F0", T0, 1.0, 0))
    assert tracer.drain() == []
    tracer.enabled = True
    tracer.add(Span("forward", "F0", T0, 1.0, 0))
    assert len(tracer.drain()) == 1


def test_tracer_loses_nothing_between_threads() -> None:
    tracer, count = Tracer(), 2000

    def work() -> None:
        for i in range(count):
            with tracer.span("send", "F", i):
                pass

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    got = []
    while any(t.is_alive() for t in threads):
        got += tracer.drain()
    for thread in threads:
        thread.join()
    got += tracer.drain()
    assert sorted(s.step for s in got) == sorted(list(range(count)) * 2)
