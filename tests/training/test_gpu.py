"""Stages on one GPU: what they compute equals the CPU's reference, through staged gloo."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from local_jobs import LLAMA, VOCAB, make_job, plan_for, worst_difference

from ray_train_geo.training.local import run_local
from ray_train_geo.training.reference import run_reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

STEPS = 10


@pytest.mark.parametrize("family", ["gpt", "llama"])
@pytest.mark.parametrize(("precision", "within"), [("fp32", 1e-3), ("bf16", 3e-2), ("fp16", 1e-2)])
def test_two_stages_share_the_gpu(
    tmp_path: Path, family: str, precision: str, within: float
) -> None:
    job = make_job(
        tmp_path,
        "parallelism.pipelines=1",
        "parallelism.stages=2",
        f"training.precision={precision}",
        f"training.steps={STEPS}",
        model=LLAMA if family == "llama" else None,
    )
    dims = job.dims(VOCAB)
    result = run_local(job, dims, plan_for(job), device="cuda")
    losses = [r.loss for r in result.records]
    expected = [r.loss for r in run_reference(job, dims)]
    assert losses == pytest.approx(expected, rel=within)


@pytest.mark.parametrize("sync", ["allreduce", "sharded_ps", "central_ps"])
def test_two_pipelines_share_the_gpu(tmp_path: Path, sync: str) -> None:
    job = make_job(
        tmp_path,
        "parallelism.pipelines=2",
        "parallelism.stages=2",
        f"parallelism.gradient_sync={sync}",
        f"training.steps={STEPS}",
    )
    dims = job.dims(VOCAB)
    result = run_local(job, dims, plan_for(job), device="cuda")
    assert worst_difference(result.records, run_reference(job, dims)) < 1e-3


def test_recomputation_and_compile_change_nothing(tmp_path: Path) -> None:
    job = make_job(
        tmp_path,
        "parallelism.pipelines=1",
        "parallelism.stages=2",
        "training.recompute=true",
        "training.compile=true",
        f"training.steps={STEPS}",
    )
    dims = job.dims(VOCAB)
    result = run_local(job, dims, plan_for(job), device="cuda", deadline_s=300)
    assert worst_difference(result.records, run_reference(job, dims)) < 1e-3
