"""What logged timings amount to: warmup, means, rates, TFLOPs, and what is missing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ray_train_geo.errors import InputError
from ray_train_geo.observe.log_failures import Ending
from ray_train_geo.observe.log_settings import RunSettings
from ray_train_geo.observe.run_speed import run_speed
from ray_train_geo.observe.training_logs import Timing, TrainingLog, read_log

LOGS = Path(__file__).parents[1] / "data/logs"
KNOWN = RunSettings(52.0, 1024, 1024, 64, True)


def log(
    *timings: Timing, settings: RunSettings = KNOWN, ending: Ending | None = None
) -> TrainingLog:
    return TrainingLog(Path("run.log"), "megatron", timings, settings, ending)


def steps(*seconds: float) -> tuple[Timing, ...]:
    return tuple(Timing(step_s=s) for s in seconds)


@pytest.mark.parametrize(
    ("name", "step_s", "tflops"),
    [  # BigScience's notes: 129 s, 52.8; 146 s, 46.7; 6.736 s, 3.9
        ("megatron-52b.log", 128.96, 52.82),
        ("megatron-deepspeed-52b.log", 145.207, 46.91),
        ("megatron-207b-stopped.log", 6.72188, 3.942),
    ],
)
def test_real_logs_have_the_speed_that_their_notes_print(
    name: str, step_s: float, tflops: float
) -> None:
    speed = run_speed(read_log(LOGS / name))
    assert speed.step_s == pytest.approx(step_s, rel=1e-4)
    assert speed.tflops_per_gpu == pytest.approx(tflops, rel=1e-3)


def test_warmup_is_left_out() -> None:
    speed = run_speed(log(*steps(300, 100, 110, 150)))
    assert (speed.timed, speed.skipped) == (3, 1)
    assert speed.step_s == pytest.approx(120)
    assert speed.median_step_s == 110
    assert speed.samples_per_s == pytest.approx(1024 / 120)
    assert speed.tokens_per_s == pytest.approx(1024 * 1024 / 120)
    assert speed.tflops_per_gpu == pytest.approx(52 * 8 * 1024 * 1024 / (120 * 64 * 1e3))
    assert (speed.status, speed.reason, speed.notes) == ("ok", None, ())
    assert run_speed(log(*steps(300, 100)), skip=0).step_s == 200
    with pytest.raises(InputError, match="skip must be 0 or more"):
        run_speed(log(), skip=-1)


def test_warmup_counts_where_there_is_nothing_else() -> None:
    speed = run_speed(log(*steps(300, 100)), skip=2)
    assert (speed.timed, speed.skipped, speed.step_s) == (2, 0, 200)
    assert speed.notes == ("no more than 2 timed: warmup is in it",)


def test_without_recomputation() -> None:
    without = run_speed(log(*steps(9, 10)), given=RunSettings(recompute=False))
    assert without.tflops_per_gpu == pytest.approx(52 * 6 * 1024 * 1024 / (10 * 64 * 1e3))
    unknown = run_speed(log(*steps(9, 10), settings=RunSettings(52.0, 1024, 1024, 64)))
    assert unknown.tflops_per_gpu == pytest.approx(52 * 8 * 1024 * 1024 / (10 * 64 * 1e3))
    assert unknown.notes == ("assumed that activations are recomputed",)
    assert unknown.recompute is None


def test_what_is_given_goes_before_what_was_logged() -> None:
    timings = [Timing(step_s=10, global_batch=512)] * 2
    speed = run_speed(log(*timings), given=RunSettings(1.0, 2048, None, 8))
    assert (speed.size_b, speed.seq_len, speed.global_batch, speed.gpus) == (1.0, 2048, 512, 8)
    assert speed.tokens_per_s == pytest.approx(512 * 2048 / 10)
    assert run_speed(log(*timings), given=RunSettings(global_batch=64)).samples_per_s == 6.4


def test_batches_that_grow() -> None:
    timings = [Timing(step_s=b / 10, global_batch=b) for b in (16, 32, 32, 64, 64, 64)]
    timings[3] = Timing(step_s=99, global_batch=64)
    speed = run_speed(log(*timings))
    assert (speed.timed, speed.skipped, speed.global_batch) == (2, 4, 64)
    assert speed.step_s == pytest.approx(6.4)
    assert speed.notes == ("the global batch changed: only steps of 64 count",)


def test_rates_become_times_by_the_batch() -> None:
    rates = [Timing(samples_per_s=r) for r in (1, 100, 50)]
    speed = run_speed(log(*rates, settings=RunSettings(1.0, 100, 200, 4, True)))
    assert speed.step_s == pytest.approx((2 + 4) / 2)
    assert speed.median_step_s == pytest.approx(3)
    assert speed.samples_per_s == pytest.approx(200 / 3)
    alone = run_speed(log(*rates, settings=RunSettings(1.0, 100, None, 4, True)))
    assert alone.step_s is None
    assert alone.samples_per_s == pytest.approx(200 / 3)
    assert alone.tflops_per_gpu == pytest.approx(speed.tflops_per_gpu)


def test_tokens_of_our_own_records() -> None:
    timings = [Timing(step_s=2.0, tokens=4096)] * 3
    speed = run_speed(log(*timings, settings=RunSettings()))
    assert speed.tokens_per_s == 2048
    assert speed.samples_per_s is None
    assert speed.notes == ("no TFLOPs without --size-b, --seq, --global-batch, --gpus",)


def test_what_is_missing_is_named() -> None:
    speed = run_speed(log(*steps(9, 10), settings=RunSettings(seq_len=8, gpus=4)))
    assert speed.step_s == 10
    assert (speed.tokens_per_s, speed.tflops_per_gpu) == (None, None)
    assert speed.notes == ("no TFLOPs without --size-b, --global-batch",)


def test_failed_runs_keep_their_speed() -> None:
    ending = Ending("failed", "out of memory: CUDA out of memory")
    speed = run_speed(log(*steps(9, 10), ending=ending))
    assert (speed.status, speed.reason, speed.step_s) == ("failed", ending.reason, 10)
    none = run_speed(log(ending=ending))
    assert (none.status, none.reason, none.timed, none.step_s) == (
        "failed", ending.reason, 0, None,
    )  # fmt: skip
    silent = run_speed(log())
    assert (silent.status, silent.reason) == ("failed", "no iteration was logged")
    assert silent.size_b == 52.0
    assert run_speed(log(ending=Ending("stopped", "cancelled by Slurm"))).status == "stopped"


def test_as_json() -> None:
    found = run_speed(log(*steps(9, 10))).to_json()
    assert json.loads(json.dumps(found)) == found
    assert found["path"] == "run.log"
    assert found["tflops_per_gpu"] == pytest.approx(52 * 8 * 1024 * 1024 / (10 * 64 * 1e3))
