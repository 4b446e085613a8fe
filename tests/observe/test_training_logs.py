"""Iteration times out of real logs, and out of lines of every format."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from observe_example import plan

from ray_train_geo.errors import InputError
from ray_train_geo.observe.log_failures import Ending
from ray_train_geo.observe.log_settings import RunSettings
from ray_train_geo.observe.run_directory import RunDirectory
from ray_train_geo.observe.run_speed import run_speed
from ray_train_geo.observe.training_logs import Timing, TrainingLog, read_log

LOGS = Path(__file__).parents[1] / "data/logs"
ARGUMENTS = "------------------------ arguments ------------------------"
DEEPSPEED = "[2023-08-02 00:41:17,936] [INFO] [timer.py:215:stop] "


def read(tmp_path: Path, *lines: str) -> TrainingLog:
    path = tmp_path / "run.log"
    path.write_text("".join(f"{line}\n" for line in lines))
    return read_log(path)


def megatron(iteration: int, ms: float, batch: int = 1024) -> str:
    return (
        f" iteration {iteration:8d}/    1000 | consumed samples: {batch * iteration:12d} | "
        f"elapsed time per iteration (ms): {ms:.1f} | learning rate: 1.500E-04 | "
        f"global batch size: {batch:5d} | lm loss: 8.025711E+00 | number of nan iterations:   0 |"
    )


@pytest.mark.parametrize(
    ("name", "step_s", "job", "ending"),
    [
        (
            "megatron-52b.log",
            [155.4838, 129.0288, 128.8915],
            RunSettings(51.970064384, 1024, 1024, 64, True),
            None,
        ),
        (
            "megatron-207b-stopped.log",
            [19.9324, 6.7075, 6.7465, 6.7364, 6.7153, 6.7037],
            RunSettings(207.019343872, 1024, 4, 256, True),
            Ending("stopped", "cancelled by Slurm due to time limit"),
        ),
        # Megatron-LM 1 on DeepSpeed's pipelines: both print each step.
        (
            "megatron-deepspeed-52b.log",
            [150.4713, 145.207],
            RunSettings(51.970064384, 1024, 1024, 64, True),
            None,
        ),
    ],
)
def test_real_logs(name: str, step_s: list[float], job: RunSettings, ending: Ending | None) -> None:
    log = read_log(LOGS / name)
    assert log.format == "megatron"
    assert [t.step_s for t in log.timings] == pytest.approx(step_s)
    assert log.settings == job
    assert log.ending == ending
    assert log.notes == ()


@pytest.mark.parametrize(
    ("line", "format_", "timing"),
    [
        (megatron(7, 1354.9, 4), "megatron", Timing(step_s=1.3549, global_batch=4)),
        (" iteration  5/ 100 | elapsed time per iteration (ms): 16491.5 | learning rate: 0.0 |",
         "megatron", Timing(step_s=16.4915)),
        ("[default0]: [2025-05-27 15:23:07] iteration 1/ 24 | consumed samples: 1 | elapsed time"
         " per iteration (ms): 271607.0 | throughput per GPU (TFLOP/s/GPU): 40.4 | global batch"
         " size:  1024 |", "megatron", Timing(step_s=271.607, global_batch=1024)),
        ("iteration 11/500 | elapsed time per iteration (ms):  52728.1 | gloabl batch size:  512 |",
         "megatron", Timing(step_s=52.7281, global_batch=512)),
        (" iteration 9/ 50 | elapsed time per iteration (ms): 1234.5/1240.2 |",
         "megatron", Timing(step_s=1.2345)),
        (" samples/sec: 12.3 | iteration 10/ 100 | elapsed time per iteration (ms): 800 |",
         "megatron", Timing(step_s=0.8)),
        (" iteration 10/ 100 | time (ms): 800.5 |", "megatron", Timing(step_s=0.8005)),
        (" iteration 10/ 100 | elapsed time per iteration (s): 12.5 |",
         "megatron", Timing(step_s=12.5)),
        ("\x1b[32m iteration 3/9 | elapsed time per iteration (ms): 1e+03\x1b[0m |",
         "megatron", Timing(step_s=1.0)),
        ("steps: 200 loss: 5.5508 lm loss: 5.5103 iter time (s): 0.936 samples/sec: 136.706",
         "deepspeed-pipeline", Timing(step_s=0.936)),
        ("step:    20 /   100 loss: 4.5 iter time (s): 0.5 samples/sec: 8.0 eta: 1m",
         "deepspeed-pipeline", Timing(step_s=0.5)),
        (DEEPSPEED + "0/20, RunningAvgSamplesPerSec=232.73, CurrSamplesPerSec=227.48,"
         " MemAllocated=0.36GB", "deepspeed-timer", Timing(samples_per_s=227.48)),
        (DEEPSPEED + "epoch=0/micro_step=40/global_step=10, RunningAvgSamplesPerSec=inf,"
         " CurrSamplesPerSec=25.7", "deepspeed-timer", Timing(samples_per_s=25.7)),
        (DEEPSPEED + "0/10, SamplesPerSec=24.6", "deepspeed-timer", Timing(samples_per_s=24.6)),
        ("{'train_runtime': 871.787, 'train_samples_per_second': 1.147, 'epoch': 1.0}",
         "huggingface-trainer", Timing(samples_per_s=1.147)),
        ("[INFO|trainer_pt_utils.py:912] >>   train_samples_per_second =      1.088",
         "huggingface-trainer", Timing(samples_per_s=1.088)),
    ],
)  # fmt: skip
def test_every_format(tmp_path: Path, line: str, format_: str, timing: Timing) -> None:
    log = read(tmp_path, "starting", line, "done")
    assert log.format == format_
    assert log.timings == (timing,)


@pytest.mark.parametrize(
    "line",
    [
        "time (ms) | forward-compute: 28117.27 | backward-compute: 74875.03",
        " validation loss at iteration 3 on validation set | lm loss value: 1.250000E+00 |",
        "(min, max) time across ranks (ms):",
        " iteration 10/ 100 | elapsed time per iteration (ms): nan |",
        " iteration 10/ 100 | elapsed time per iteration (ms): 0.0 |",
        "[Rank 0] time (ms) | optimizer_allgather: 1.05 | optimizer_step: 77.19",
        "> elasped time to build and save doc-idx mapping (seconds): 0.002110",
        DEEPSPEED + "0/20, RunningAvgSamplesPerSec=0, CurrSamplesPerSec=0.0",
    ],
)
def test_lines_that_time_no_iteration(tmp_path: Path, line: str) -> None:
    with pytest.raises(InputError, match="has no iteration times"):
        read(tmp_path, line)


def test_copies_of_a_line_count_once(tmp_path: Path) -> None:
    lines = [megatron(i, 1000 * i) for i in (1, 1, 2, 3, 3, 3)]
    assert [t.step_s for t in read(tmp_path, *lines).timings] == [1, 2, 3]
    trainer = "{'train_samples_per_second': 1.147}"
    assert len(read(tmp_path, trainer, "a line between", trainer).timings) == 1


def test_the_format_that_tells_most_is_read(tmp_path: Path) -> None:
    pipeline = "steps: 1 loss: 12.7902 iter time (s): 150.471 samples/sec: 6.805"
    timer = DEEPSPEED + "0/1, RunningAvgSamplesPerSec=6.8, CurrSamplesPerSec=6.8"
    assert read(tmp_path, timer, pipeline, megatron(1, 9)).format == "megatron"
    assert read(tmp_path, timer, pipeline).format == "deepspeed-pipeline"


def test_of_several_runs_the_last_counts(tmp_path: Path) -> None:
    first = [ARGUMENTS, "  world_size ..... 64", megatron(1, 1000), "CUDA out of memory"]
    second = [ARGUMENTS, "  world_size ..... 32", megatron(1, 2000), megatron(2, 3000)]
    log = read(tmp_path, *first, *second)
    assert [t.step_s for t in log.timings] == [2, 3]
    assert log.settings.gpus == 32
    assert log.ending is None
    assert log.notes == ("the last of 2 runs in this file",)
    # One that never came to an iteration still counts as the last.
    log = read(tmp_path, *second, *first[:2], "CUDA out of memory")
    assert log.timings == ()
    assert log.ending == Ending("failed", "out of memory: CUDA out of memory")
    # Before the first iteration, arguments are of the same run, whoever prints them again.
    assert read(tmp_path, ARGUMENTS, *first[:3]).notes == ()


def test_a_run_that_failed_before_its_first_iteration(tmp_path: Path) -> None:
    log = read(tmp_path, "building GPT model ...", "Killed")
    assert log.timings == ()
    assert log.format is None
    assert log.ending == Ending("failed", "killed by SIGKILL")
    log = read(tmp_path, ARGUMENTS, "  world_size ..... 64")
    assert log.ending is None
    assert log.settings.gpus == 64


def test_progress_bars_hide_nothing(tmp_path: Path) -> None:
    path = tmp_path / "run.log"
    path.write_bytes(b" 1%|#| 1/9\r 2%|#| 2/9\r" + megatron(3, 500).encode() + b"\xff\r\n")
    assert [t.step_s for t in read_log(path).timings] == [0.5]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "can't read .*run.log: no such file"),
        (b"", "is empty"),
        (b" \n\n", "is empty"),
        (b"\x1f\x8b\x00\x01", "is binary: give the log as text, unpacked"),
        (b"no numbers here\n", "no log of Megatron-LM, DeepSpeed or the Hugging Face Trainer"),
        (b'{"loss": 3.1}\n{"loss": 3.0}\n', "has no iteration times"),
    ],
)
def test_what_is_no_log(tmp_path: Path, content: bytes | None, says: str) -> None:
    path = tmp_path / "run.log"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=says):
        read_log(path)


FRAGMENTS = [
    " iteration ", "12/ 100", " | elapsed time per iteration (ms): ", "1354.9", "nan", "0", "e99",
    "global batch size:  8", "steps: 3 loss: 1 iter time (s): ", "\n", "\r", "\x1b[31m", " ..... ",
    "world_size", "num_layers", "hidden_size", "12", ARGUMENTS, "Traceback (most recent call last)",
    "ValueError: x", "CurrSamplesPerSec=", "0/10, ", "train_samples_per_second = ", "Killed", "\0",
    "exits with return code = ", "-9", "{", '"step_s": 1}', "number of trainable parameters = ",
]  # fmt: skip


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from(FRAGMENTS), min_size=1, max_size=40))
def test_any_text_is_read_or_refused(parts: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "any.log")
        path.write_text("".join(parts))
        try:
            log = read_log(path)
        except InputError:
            return
    assert log.timings or log.ending or log.settings != RunSettings()
    assert run_speed(log).status in ("ok", "failed", "stopped")


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    made = RunDirectory.create(tmp_path / "mine")
    made.write_text(
        "job.yaml",
        "model: {name: gpt2}\ndata: {path: not/here}\n"
        "training: {steps: 9, global_batch: 8, seq_len: 64, recompute: true}\n",
    )
    made.write_json("plan.json", plan().to_json())
    for step in range(1, 4):
        made.append_metrics({"step": step, "step_s": 0.5 * step, "tokens": 512})
    return made


def test_a_run_of_ours_by_its_directory(run: RunDirectory) -> None:
    log = read_log(run.path)
    assert log.format == "ray_train_geo"
    assert log.timings == tuple(Timing(step_s=s, tokens=512) for s in (0.5, 1.0, 1.5))
    assert (log.settings.seq_len, log.settings.global_batch, log.settings.gpus) == (64, 8, 4)
    assert log.settings.recompute is True
    assert log.settings.size_b == 0.124439808
    assert log.ending is None
    assert read_log(run.metrics_path) == log


def test_a_run_of_ours_that_failed(run: RunDirectory) -> None:
    run.append_event("start", steps=9)
    run.append_event("error", message="a worker is lost", kind="WorkerError", step=3)
    run.append_event("finish", phase="failed", step=3, checkpoint=None)
    assert read_log(run.path).ending == Ending("failed", "a worker is lost")
    run.append_event("start", steps=9)
    assert read_log(run.path).ending is None
    run.metrics_path.unlink()
    assert read_log(run.path).timings == ()


def test_a_vocabulary_that_only_a_file_tells(run: RunDirectory) -> None:
    run.write_text(
        "job.yaml",
        "model: {layers: 2, dim: 64, heads: 2}\n"
        "data: {path: not/here, tokenizer: some/tokenizer.json}\n"
        "training: {steps: 9, global_batch: 8, seq_len: 64}\n",
    )
    assert read_log(run.path).settings.size_b is None


def test_metrics_without_their_run(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    records = [{"step_s": 0.5, "tokens": 512}, {"step_s": None}, {"step_s": 2, "tokens": 512}]
    path.write_text("\n".join(map(json.dumps, records)) + '\n{"step_s": 1, "tok')
    log = read_log(path)
    assert log.timings == (Timing(step_s=0.5, tokens=512), Timing(step_s=2, tokens=512))
    assert log.settings == RunSettings()


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no run at"):
        read_log(tmp_path)
