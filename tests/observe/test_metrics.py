"""The field's metrics, against published figures and against the model catalog."""

from __future__ import annotations

import csv
import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_train_geo.cluster.gpus import gpu
from ray_train_geo.errors import InputError
from ray_train_geo.model.catalog import CATALOG, head_flops, total_parameters
from ray_train_geo.observe.metrics import (
    checkpoint_bytes,
    checkpoint_save_s,
    dollars_per_million_tokens,
    dollars_per_step,
    gpt_parameters,
    hardware_efficiency,
    mfu,
    model_tflops_per_gpu,
    pflops,
    step_pflop,
    tokens_per_s,
)

PFLOP_TABLE = Path(__file__).parents[1] / "data/measurements/dtfm_workload_pflop.csv"
XL = CATALOG["gpt3-xl"]
MODELS = {"GPT3-XL": "gpt3-xl", "GPT3-6.7B": "gpt3-6.7b", "GPT3-13B": "gpt3-13b"}

figure = st.floats(1e-3, 1e6)


def test_pflop_of_every_published_workload() -> None:
    with PFLOP_TABLE.open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12
    for row in rows:
        dims = dataclasses.replace(CATALOG[MODELS[row["model"]]], layers=int(row["layers"]))
        found = step_pflop(dims=dims, seq_len=2048, global_batch=int(row["batch"]))
        assert found == pytest.approx(float(row["pflop_formula"]), abs=0.001)
        # As printed, they were made of a figure for one layer that had been rounded.
        assert found == pytest.approx(float(row["pflop"]), rel=3e-4)


@given(
    layers=st.integers(1, 100),
    heads=st.integers(1, 64),
    seq_len=st.integers(1, 8192),
    batch=st.integers(1, 4096),
)
def test_pflop_is_the_formula(layers: int, heads: int, seq_len: int, batch: int) -> None:
    d = 64 * heads
    dims = dataclasses.replace(XL, layers=layers, dim=d, ffn_dim=4 * d, heads=heads, kv_heads=heads)
    for factor, recompute in ((96, True), (72, False)):
        formula = factor * layers * batch * seq_len * d**2 * (1 + seq_len / (6 * d)) / 1e15
        found = step_pflop(dims=dims, seq_len=seq_len, global_batch=batch, recompute=recompute)
        assert found == pytest.approx(formula)


def test_pflops_and_efficiency_of_a_published_run() -> None:
    # DT-FM's case 1: GPT-3 XL, batch 1024, on 64 V100: 23.64 PFLOP.
    peak = 64 * dict(gpu("V100").peak_flops_per_s)["fp16"]
    speed = pflops(pflop=23.64, step_s=10.1)
    assert speed == pytest.approx(2.3406, rel=1e-4)
    assert hardware_efficiency(pflops=speed, peak_flops_per_s=peak) == pytest.approx(
        23.64e15 / 10.1 / (64 * 125e12), rel=1e-3
    )


def test_mfu_counts_the_head_and_no_recomputation() -> None:
    peak, step_s = 64 * 125e12, 10.0
    found = mfu(dims=XL, seq_len=2048, global_batch=1024, step_s=step_s, peak_flops_per_s=peak)
    layers = step_pflop(dims=XL, seq_len=2048, global_batch=1024, recompute=False) * 1e15
    head = 3 * head_flops(XL, 2048, 1024)
    assert found == pytest.approx((layers + head) / (step_s * peak))
    # All of it at the peak's speed is 1.
    whole_s = (layers + head) / peak
    assert mfu(
        dims=XL, seq_len=2048, global_batch=1024, step_s=whole_s, peak_flops_per_s=peak
    ) == pytest.approx(1)


def test_tflops_are_bigsciences() -> None:
    # The one-liner in its notes: 52 B, batch 1024, 64 GPUs, 127 s.
    work: dict[str, Any] = {"size_b": 52, "seq_len": 1024, "global_batch": 1024, "gpus": 64}
    found = model_tflops_per_gpu(**work, step_s=127)
    assert found == pytest.approx(52 * 4 * 2 * 1024 * 1024 / (127 * 64 * 1e3))
    without = model_tflops_per_gpu(**work, step_s=127, recompute=False)
    assert without == pytest.approx(3 / 4 * found)


def test_tflops_are_nearly_pflops_for_a_large_model() -> None:
    """The two count the same work; one leaves attention out, the other the embedding."""
    dims, seq_len, batch, step_s, gpus = CATALOG["gpt3-13b"], 2048, 1024, 100.0, 64
    by_size = model_tflops_per_gpu(
        size_b=total_parameters(dims) / 1e9,
        seq_len=seq_len,
        global_batch=batch,
        step_s=step_s,
        gpus=gpus,
    )
    by_layers = pflops(
        pflop=step_pflop(dims=dims, seq_len=seq_len, global_batch=batch), step_s=step_s
    )
    assert by_size == pytest.approx(1e3 * by_layers / gpus, rel=0.05)


@pytest.mark.parametrize("name", [n for n, dims in CATALOG.items() if dims.family == "gpt"])
def test_gpt_parameters_are_the_catalogs(name: str) -> None:
    dims = CATALOG[name]
    assert gpt_parameters(
        layers=dims.layers,
        dim=dims.dim,
        vocab_size=dims.vocab_size,
        max_seq_len=dims.max_seq_len,
    ) == total_parameters(dims)


@given(figure, figure)
def test_dollars_agree_by_step_and_by_token(dollars_per_hour: float, step_s: float) -> None:
    speed = tokens_per_s(seq_len=1000, global_batch=1000, step_s=step_s)
    by_token = dollars_per_million_tokens(dollars_per_hour=dollars_per_hour, tokens_per_s=speed)
    by_step = dollars_per_step(dollars_per_hour=dollars_per_hour, step_s=step_s)
    assert by_token == pytest.approx(by_step)  # a step is a million tokens here


def test_dollars_by_hand() -> None:
    # 64 devices of $2.50 train 1e6 tokens/s for an hour.
    found = dollars_per_million_tokens(dollars_per_hour=160, tokens_per_s=1e6)
    assert found == pytest.approx(160 / 3600)
    assert dollars_per_step(dollars_per_hour=0, step_s=9) == 0


def test_checkpoint_is_fourteen_bytes_a_parameter() -> None:
    assert checkpoint_bytes(parameters=52e9) == 728e9
    assert checkpoint_save_s(checkpoint_bytes=728e9, writer_bytes_per_s=2e9) == 364
    assert checkpoint_save_s(
        checkpoint_bytes=728e9, writer_bytes_per_s=2e9, writers=16
    ) == pytest.approx(22.75)
    # More writers don't help where the storage is full.
    capped = checkpoint_save_s(
        checkpoint_bytes=728e9, writer_bytes_per_s=2e9, writers=640, storage_bytes_per_s=40e9
    )
    assert capped == pytest.approx(18.2)


@pytest.mark.parametrize("wrong", [0, -1.0, math.nan, math.inf])
def test_figures_must_be_positive(wrong: float) -> None:
    says = "must be a positive number"
    with pytest.raises(InputError, match=f"step_s {says}, but is"):
        pflops(pflop=1, step_s=wrong)
    with pytest.raises(InputError, match=f"size_b {says}"):
        model_tflops_per_gpu(size_b=wrong, seq_len=1, global_batch=1, step_s=1, gpus=1)
    with pytest.raises(InputError, match=f"parameters {says}"):
        checkpoint_bytes(parameters=wrong)
    with pytest.raises(InputError, match=f"peak_flops_per_s {says}"):
        hardware_efficiency(pflops=1, peak_flops_per_s=wrong)
    with pytest.raises(InputError, match=f"tokens_per_s {says}"):
        dollars_per_million_tokens(dollars_per_hour=1, tokens_per_s=wrong)


@pytest.mark.parametrize("wrong", [-1.0, math.nan, math.inf])
def test_prices_may_be_zero_but_no_less(wrong: float) -> None:
    with pytest.raises(InputError, match="dollars_per_hour must be 0 or a positive number"):
        dollars_per_step(dollars_per_hour=wrong, step_s=1)


@pytest.mark.parametrize("wrong", [0.0, -1.0, math.nan])
def test_storage_may_be_endlessly_fast_but_not_still(wrong: float) -> None:
    with pytest.raises(InputError, match="storage_bytes_per_s must be above 0"):
        checkpoint_save_s(checkpoint_bytes=1, writer_bytes_per_s=1, storage_bytes_per_s=wrong)
