"""Random small plans over shared resources, for property tests."""

from __future__ import annotations

from hypothesis import strategies as st

from ray_train_geo.schedule.gpipe import gpipe
from ray_train_geo.schedule.one_f_one_b import one_f_one_b
from ray_train_geo.simulation.work import Flow, PipelineWork

RESOURCES = 4


@st.composite
def pipeline_work(draw: st.DrawFn, resources: int = RESOURCES) -> PipelineWork:
    stages, microbatches = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    if draw(st.booleans()):
        actions = gpipe(stages, microbatches)
    else:
        warmup = sorted(
            draw(st.lists(st.integers(0, 5), min_size=stages, max_size=stages)), reverse=True
        )
        actions = one_f_one_b(warmup, microbatches)
    seconds = st.tuples(*[st.floats(0.1, 2)] * stages)
    flow = st.builds(
        Flow,
        latency_s=st.sampled_from([0.0, 0.3, 1.7]),
        size_bytes=st.sampled_from([1.0, 2.0, 2.5]),
        seconds_per_byte=st.sampled_from([0.2, 0.5, 1.0]),
        resources=st.sets(st.integers(0, resources - 1), max_size=3).map(lambda s: tuple(sorted(s)))
        if resources
        else st.just(()),
    )
    hops = st.tuples(*[flow] * (stages - 1))
    return PipelineWork(actions, draw(seconds), draw(seconds), draw(hops), draw(hops))


plans = st.lists(pipeline_work(), min_size=1, max_size=3)
capacities = st.lists(st.sampled_from([0.1, 0.3, 0.5, 1.0]), min_size=RESOURCES, max_size=RESOURCES)
"""Seconds per byte."""
