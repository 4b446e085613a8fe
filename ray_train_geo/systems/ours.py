"""Ours: the plan that our planner finds on the cluster as it behaves, in the event engine."""

from __future__ import annotations

from ray_train_geo.planning.planner import plan
from ray_train_geo.planning.predict import predict_plan
from ray_train_geo.planning.request import request
from ray_train_geo.systems.case import Case, Outcome
from ray_train_geo.systems.simulated import TracedPipeline

__all__ = ["ours"]

_CLASSES = 2
"""Outputs of a classification."""


def ours(case: Case) -> Outcome:
    """Planned by the step time, with what the settings allow."""
    values = case.values
    codecs = values.text("codecs").split("+")
    # Without a head a model is what DT-FM trained: its task was a classification.
    overrides = () if values.flag("head") else (f"model.vocab_size={_CLASSES}",)
    asked = request(
        model=case.model,
        overrides=overrides,
        topology=case.topology,
        global_batch=case.global_batch,
        seq_len=case.seq_len,
        microbatch=case.microbatch,
        precision=case.precision,
        recompute=values.flag("recompute"),
        stages=values.number("stages"),
        replicas=values.number("replicas"),
        schedule=values.text("schedule"),
        gradient_sync=values.text("gradient_sync"),
        codecs=codecs,
    )
    found = plan(case.topology, asked.job, asked.vocab_size, asked.options, prove=False)
    step = predict_plan(found, case.topology, asked.job, asked.vocab_size)
    pipelines_s = max(step.makespan_s)
    compute_s = max(
        sum(end - start for start, end in zip(t.starts_s[s], t.ends_s[s], strict=True))
        for t in step.timelines
        for s in range(len(t.actions))
    )
    breakdown = {
        "compute": compute_s,
        "pipeline": pipelines_s - compute_s,
        "gradient_sync": step.sync_s,
        "optimizer": max(0.0, step.step_s - pipelines_s - step.sync_s),
    }
    trace = tuple(
        TracedPipeline(tuple(stage.device for stage in p.stages), t)
        for p, t in zip(found.pipelines, step.timelines, strict=True)
    )
    depth = sorted({len(p.stages) for p in found.pipelines})
    note = (
        f"{len(found.pipelines)} pipelines of {' or '.join(map(str, depth))} stages on "
        f"{len(found.devices)} devices, {found.schedule}, {found.gradient_sync}"
    )
    return Outcome(
        breakdown, trace if case.trace else (), (pipelines_s, pipelines_s + step.sync_s), (note,)
    )
