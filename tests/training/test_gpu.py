"""Stages on one GPU: what they compute equals the CPU's reference, through staged gloo."""

from __future__ import annotations

import time
from contextlib import nullcontext
from pathlib import Path
from typing import get_args

import pytest
import torch
from local_jobs import LLAMA, VOCAB, make_job, plan_for, worst_difference

from ray_train_geo.spec import GradientSyncName
from ray_train_geo.training.gauge import Gauge
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


@pytest.mark.parametrize("recompute", [False, True])
def test_weight_gradients_apart(tmp_path: Path, recompute: bool) -> None:
    job = make_job(
        tmp_path,
        *("parallelism.pipelines=1", "parallelism.stages=2", "parallelism.schedule=zero-bubble"),
        *(f"training.recompute={recompute}", f"training.steps={STEPS}"),
    )
    dims = job.dims(VOCAB)
    result = run_local(job, dims, plan_for(job), device="cuda")
    assert worst_difference(result.records, run_reference(job, dims)) < 1e-3


@pytest.mark.parametrize("sync", get_args(GradientSyncName))
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


def test_a_stages_time_is_the_gpus_not_that_of_the_launch() -> None:
    device = torch.device("cuda")
    gauge = Gauge(device, lambda kind: nullcontext())
    x = torch.randn(8192, 8192, device=device)
    x @ x  # loads what the first one needs
    torch.cuda.synchronize()
    start_s = time.perf_counter()
    for kind in ("F", "B"):
        with gauge(kind):
            for _ in range(20):
                x @ x
    launched_s = time.perf_counter() - start_s
    torch.cuda.synchronize()
    took_s = time.perf_counter() - start_s
    seconds = gauge.microbatch_s()
    assert seconds is not None
    assert launched_s < 0.5 * seconds
    assert seconds == pytest.approx(took_s, rel=0.2)
