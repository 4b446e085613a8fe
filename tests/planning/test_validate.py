from __future__ import annotations

from dataclasses import replace

import pytest

from ray_train_geo.cluster.topology import Device, Topology
from ray_train_geo.errors import PlanError
from ray_train_geo.planning.planner import plan
from ray_train_geo.planning.validate import validate_plan
from ray_train_geo.spec import parse_job

JOB = parse_job(
    {
        "model": {"layers": 4, "dim": 128, "heads": 4},
        "data": {"path": "python://stdlib"},
        "training": {"steps": 1, "global_batch": 16, "microbatch": 2, "seq_len": 128},
        "parallelism": {"pipelines": 2, "stages": 2},
    }
)
TOPOLOGY = Topology(tuple(Device(f"n{i}", f"n{i}") for i in range(5)))
GOOD = plan(TOPOLOGY, JOB)


def with_stage(pipeline=0, stage=0, **changes):
    pipelines = list(GOOD.pipelines)
    stages = list(pipelines[pipeline].stages)
    stages[stage] = replace(stages[stage], **changes)
    pipelines[pipeline] = replace(pipelines[pipeline], stages=tuple(stages))
    return replace(GOOD, pipelines=tuple(pipelines))


def with_pipeline(pipeline=0, **changes):
    pipelines = list(GOOD.pipelines)
    pipelines[pipeline] = replace(pipelines[pipeline], **changes)
    return replace(GOOD, pipelines=tuple(pipelines))


def test_a_good_plan_passes():
    validate_plan(GOOD, TOPOLOGY, JOB)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (with_stage(device="gone"), r"not there: \['gone'\]"),
        (with_stage(device="n1"), "more than one stage"),
        (with_stage(device="n4"), "not those of its stages"),
        (replace(GOOD, layers=5), "for 5 layers, the model has 4"),
        (with_stage(layers=(1, 2)), "pipeline 0 must hold layers 0-3 once"),
        (with_stage(layers=(0, 1)), "pipeline 0 must hold layers 0-3 once"),
        (with_stage(1, 1, layers=(2, 3)), "pipeline 1 must hold layers 0-3 once"),
        (with_stage(1, 1, layers=(1, 4)), "pipeline 1 must hold layers 0-3 once"),
        (with_pipeline(0, microbatches=0), "pipeline 0 has microbatches"),
        (with_pipeline(1, first_microbatch=3), "expected at least one, from 4 on"),
        (with_pipeline(1, microbatches=3), "the plan has 7 microbatches, but a step has 8"),
        (with_stage(stage=1, warmup=3), "deadlock"),
        (with_stage(stage=1, warmup=-1), "deadlock"),
    ],
)
def test_what_is_wrong_is_named(bad, message):
    with pytest.raises(PlanError, match=message):
        validate_plan(bad, TOPOLOGY, JOB)


def test_memory_is_checked_at_the_plans_own_warmup():
    # The warmup is what fills memory here: the same stages fit with less of it.
    most = max(s.memory_bytes for p in GOOD.pipelines for s in p.stages)
    devices = tuple(replace(d, memory_bytes=most) for d in TOPOLOGY.devices)
    tight = Topology(devices)
    validate_plan(GOOD, tight, JOB)
    greedy = with_stage(0, 0, warmup=3)
    with pytest.raises(PlanError, match=r"pipeline 0 stage 0 .* needs"):
        validate_plan(greedy, tight, JOB)
    with pytest.raises(PlanError, match="needs"):
        validate_plan(replace(GOOD, schedule="gpipe"), tight, JOB)


def test_memory_counts_weight_gradients_that_are_put_off():
    split = replace(GOOD, schedule="zero-bubble")
    validate_plan(split, TOPOLOGY, JOB)
    # A microbatch that waits for its W holds what one does that waits for its B, and no less.
    whole = max(s.memory_bytes for p in GOOD.pipelines for s in p.stages)
    tight = Topology(tuple(replace(d, memory_bytes=whole) for d in TOPOLOGY.devices))
    with pytest.raises(PlanError, match=r"pipeline 0 stage . .* needs"):
        validate_plan(split, tight, JOB)
    late = with_stage(stage=1, deferred=-1)
    with pytest.raises(PlanError, match="pipeline 0: deferred must not be negative"):
        validate_plan(replace(late, schedule="zero-bubble"), TOPOLOGY, JOB)
