"""The measured speed of a device."""

from __future__ import annotations

import time

import pytest
import torch

from ray_train_geo.model.catalog import CATALOG
from ray_train_geo.spec import Precision, TrainingSpec
from ray_train_geo.training.measure import device_memory_bytes, sustained_flops_per_s

CPU = torch.device("cpu")


def training(precision: Precision = "fp32", microbatch: int = 1) -> TrainingSpec:
    return TrainingSpec(
        steps=1, global_batch=microbatch, microbatch=microbatch, seq_len=32, precision=precision
    )


@pytest.mark.parametrize("name", ["gpt-tiny", "llama-tiny"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_is_a_plausible_speed_and_keeps_its_budget(name: str, precision: Precision) -> None:
    began = time.perf_counter()
    speed = sustained_flops_per_s(CATALOG[name], training(precision), CPU, budget_s=0.05)
    assert 1e6 < speed < 1e14
    assert time.perf_counter() - began < 10


def test_twice_the_time_for_the_same_work_is_half_the_speed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = iter(x * 0.5 for x in range(1000))
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    fast = sustained_flops_per_s(CATALOG["gpt-tiny"], training(), CPU, budget_s=0.0)
    clock = iter(x * 1.0 for x in range(1000))
    slow = sustained_flops_per_s(CATALOG["gpt-tiny"], training(), CPU, budget_s=0.0)
    assert fast == pytest.approx(2 * slow)


def test_a_cpu_has_no_memory_of_its_own() -> None:
    assert device_memory_bytes(CPU) is None
