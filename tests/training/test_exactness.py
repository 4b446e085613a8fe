"""Promise 1: any plan gives the losses and gradient norms of one plain PyTorch loop."""

from __future__ import annotations

import functools
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
from local_jobs import GPT, LLAMA, VOCAB, make_job, plan_for, train, worst_difference

from ray_train_geo.planning.plan import PipelinePlan
from ray_train_geo.training.assignment import StepRecord
from ray_train_geo.training.reference import run_reference

PLANS = {
    "1x1": ["parallelism.pipelines=1", "parallelism.stages=1"],
    "1x2": ["parallelism.pipelines=1", "parallelism.stages=2"],
    "2x1": ["parallelism.pipelines=2", "parallelism.stages=1"],
    "2x2": ["parallelism.pipelines=2", "parallelism.stages=2"],
    "1x3 uneven layers": ["parallelism.pipelines=1", "parallelism.layers=[0,1,4,6]"],
    "2 pipelines, other boundaries": ["parallelism.layers=[[0,2,6],[0,5,6]]"],
    "2 pipelines, other depths": ["parallelism.layers=[[0,1,3,6],[0,4,6]]"],
    "uneven microbatches": ["parallelism.stages=2", "parallelism.microbatches=[5,3]"],
    "3 pipelines of all kinds": [
        "parallelism.layers=[[0,6],[0,1,6],[0,2,4,6]]",
        "parallelism.microbatches=[4,1,3]",
    ],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("exactness")


@functools.cache
def reference(folder: Path, family: str) -> tuple[StepRecord, ...]:
    job = make_job(folder, model=GPT if family == "gpt" else LLAMA)
    return tuple(run_reference(job, job.dims(VOCAB)))


# Every plan once; the one that stresses a sync or a schedule most, with all of them; and the others
# with all of them where there is time.
SYNCS = tuple(product(("gpipe", "1f1b"), ("allreduce", "sharded_ps", "central_ps")))
COMBINATIONS = [
    (name, "1f1b", "allreduce") for name in PLANS if name != "3 pipelines of all kinds"
] + [("3 pipelines of all kinds", *which) for which in SYNCS]
COMBINATIONS += [
    ("1x3 uneven layers", "zero-bubble", "allreduce"),
    ("3 pipelines of all kinds", "zero-bubble", "sharded_ps"),
]
MORE = [
    pytest.param(name, *which, marks=pytest.mark.soak)
    for name in ("1x1", "2x2", "2 pipelines, other depths")
    for which in (*SYNCS, ("zero-bubble", "allreduce"))
    if (name, *which) not in COMBINATIONS
]


@pytest.mark.parametrize(("name", "schedule", "sync"), [*COMBINATIONS, *MORE])
def test_a_plan_does_not_change_the_curve(
    folder: Path, name: str, schedule: str, sync: str
) -> None:
    job = make_job(
        folder,
        *PLANS[name],
        f"parallelism.schedule={schedule}",
        f"parallelism.gradient_sync={sync}",
        f"run.name={name}-{schedule}-{sync}".replace(" ", "_").replace(",", ""),
    )
    records = train(job).records
    assert worst_difference(records, list(reference(folder, "gpt"))) < 1e-4


@pytest.mark.parametrize("sync", ["hierarchical", "tree", "sharded_ps"])
def test_regions_and_unequal_shards_do_not_either(folder: Path, sync: str) -> None:
    job = make_job(
        folder,
        "parallelism.layers=[[0,6],[0,1,6],[0,6],[0,6]]",
        f"parallelism.gradient_sync={sync}",
        f"run.name=regions-{sync}",
    )
    plan = plan_for(job, devices=5, regions=2)
    assert len({d.region for d in plan.devices}) == 2
    plan = replace(plan, pipelines=tuple(map(unequal_shards, range(4), plan.pipelines)))
    records = train(job, plan=plan, until=10).records
    assert worst_difference(records, list(reference(folder, "gpt"))[:10]) < 1e-4


def unequal_shards(number: int, pipeline: PipelinePlan) -> PipelinePlan:
    stages = tuple(replace(stage, shard=(0.0, 1.0, 2.5, 0.5)[number]) for stage in pipeline.stages)
    return replace(pipeline, stages=stages)


@pytest.mark.parametrize(
    ("schedule", "sync", "more"),
    [
        ("gpipe", "allreduce", []),
        ("1f1b", "sharded_ps", []),
        ("zero-bubble", "central_ps", ["training.recompute=true"]),
        *(pytest.param(*which, [], marks=pytest.mark.soak) for which in SYNCS),
    ],
)
def test_llama_too(folder: Path, schedule: str, sync: str, more: list[str]) -> None:
    job = make_job(
        folder,
        *more,
        "parallelism.layers=[[0,2,6],[0,1,5,6]]",
        "parallelism.microbatches=[3,5]",
        f"parallelism.schedule={schedule}",
        f"parallelism.gradient_sync={sync}",
        f"run.name=llama-{schedule}-{sync}",
        model=LLAMA,
    )
    records = train(job).records
    assert worst_difference(records, list(reference(folder, "llama"))) < 1e-4
