"""Random small plans over shared resources, for property tests."""

from __future__ import annotations

from typing import get_args

from hypothesis import strategies as st

from ray_train_geo.schedule.make import make_schedule
from ray_train_geo.simulation.work import Flow, PipelineWork
from ray_train_geo.spec import ScheduleName

RESOURCES = 4


@st.composite
def pipeline_work(draw: st.DrawFn, resources: int = RESOURCES) -> PipelineWork:
    stages, microbatches = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    counts = st.lists(st.integers(0, 5), min_size=stages, max_size=stages)
    schedule = draw(st.sampled_from(get_args(ScheduleName)))
    warmup = sorted(draw(counts), reverse=True)
    actions = make_schedule(schedule, warmup, draw(counts), microbatches)
    seconds = st.tuples(*[st.floats(0.1, 2)] * stages)
    flow = st.builds(
        Flow,
        latency_s=st.sampled_from([0.0, 0.3, 1.7]),
        size_bytes=st.sampled_from([1.0, 2.0, 2.5]),
        seconds_per_byte=st.sampled_from([0.2, 0.5, 1.0]),
        resources=st.sets(st.integers(0, resources - 1), max_size=3).map(lambda s: tuple(sorted(s)))
        if resources
        else st.just(()),
        cold_s=st.sampled_from([0.0, 0.0, 0.9]),
    )
    hops = st.tuples(*[flow] * (stages - 1))
    pace = None
    if draw(st.booleans()):
        paces = st.tuples(*[st.floats(0.5, 2)] * len(actions[0]))
        pace = draw(st.tuples(*[paces] * stages))
    times = draw(seconds), draw(seconds)
    weight_s = draw(seconds) if schedule == "zero-bubble" else None
    blocking = draw(st.booleans())
    slowdown = draw(st.sampled_from([0.0, 0.0, 0.3]))
    return PipelineWork(actions, *times, draw(hops), draw(hops), pace, blocking, weight_s, slowdown)


plans = st.lists(pipeline_work(), min_size=1, max_size=3)
capacities = st.lists(st.sampled_from([0.1, 0.3, 0.5, 1.0]), min_size=RESOURCES, max_size=RESOURCES)
"""Seconds per byte."""
