"""Promise 1: any plan gives the losses and gradient norms of one plain PyTorch loop."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
from local_jobs import GPT, LLAMA, VOCAB, make_job, train, worst_difference

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


# Every plan once; and those that stress a sync or a schedule most, with all of them.
COMBINATIONS = [(name, "1f1b", "allreduce") for name in PLANS] + [
    (name, schedule, sync)
    for name in ("2x2", "2 pipelines, other depths", "3 pipelines of all kinds")
    for schedule in ("gpipe", "1f1b")
    for sync in ("allreduce", "sharded_ps", "central_ps")
    if (schedule, sync) != ("1f1b", "allreduce")
]


@pytest.mark.parametrize(("name", "schedule", "sync"), COMBINATIONS)
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


@pytest.mark.parametrize("sync", ["allreduce", "sharded_ps", "central_ps"])
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_llama_too(folder: Path, schedule: str, sync: str) -> None:
    job = make_job(
        folder,
        "parallelism.layers=[[0,2,6],[0,1,5,6]]",
        "parallelism.microbatches=[3,5]",
        f"parallelism.schedule={schedule}",
        f"parallelism.gradient_sync={sync}",
        f"run.name=llama-{schedule}-{sync}",
        model=LLAMA,
    )
    records = train(job).records
    assert worst_difference(records, list(reference(folder, "llama"))) < 1e-4
