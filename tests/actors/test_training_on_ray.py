"""The main job on Ray, through the command line: what it leaves behind, stops, losses, errors."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray_runs import (
    VOCAB,
    environment,
    events,
    lines,
    ray_head,
    steps,
    train,
    training,
    wait_until,
    write_job,
)

from ray_train_geo.spec import load_job
from ray_train_geo.training.assignment import StepRecord
from ray_train_geo.training.reference import run_reference

pytestmark = [pytest.mark.ray, pytest.mark.timeout(200)]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with ray_head(cpus=2) as (address, _):
        yield address


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> list[StepRecord]:
    """The tiny job in one plain loop."""
    job = load_job(write_job(tmp_path_factory.mktemp("reference")))
    return run_reference(job, job.dims(VOCAB))


def assert_curve(folder: Path, reference: list[StepRecord], upto: int = 12) -> None:
    """Every step was committed once, with the reference's loss and norm."""
    records = lines(folder, "metrics.jsonl")
    assert [r["step"] for r in records] == list(range(1, upto + 1))
    for ours, expected in zip(records, reference, strict=False):
        assert ours["loss"] == pytest.approx(expected.loss, rel=1e-4)
        assert ours["grad_norm"] == pytest.approx(expected.grad_norm, rel=1e-4)


def test_a_run_leaves_its_whole_record(
    address: str, tmp_path: Path, reference: list[StepRecord]
) -> None:
    done = train(tmp_path, "--json", "--address", address)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "phase": "finished",
        "step": 12,
        "checkpoint": str(tmp_path / "tiny/checkpoints/step-00000012"),
        "path": str(tmp_path / "tiny"),
    }
    assert_curve(tmp_path, reference)
    for record in lines(tmp_path, "metrics.jsonl"):
        assert {
            "time", "step", "loss", "tokens", "step_s", "predicted_step_s", "tokens_per_s",
            "grad_norm", "lr", "generation",
        } <= set(record)  # fmt: skip
        assert record["tokens"] == 8 * 32
    (generation,) = events(tmp_path, "generation")
    assert [w["rank"] for w in generation["workers"]] == [0, 1, 2, 3]
    for worker in generation["workers"]:
        assert {
            "rank", "pid", "node_id", "host", "region", "pipeline", "stage", "layers",
        } <= set(worker)  # fmt: skip
    assert [e["step"] for e in events(tmp_path, "checkpoint")] == [4, 8, 12]
    trace = json.loads((tmp_path / "tiny/trace.json").read_text())
    seen = {(e["pid"], e["cat"]) for e in trace["traceEvents"] if e["ph"] == "X"}
    assert {c for _, c in seen} == {
        "forward", "backward", "send", "receive", "sync", "optimizer",
    }  # fmt: skip
    assert {rank for rank, _ in seen} == {0, 1, 2, 3}
    report = (tmp_path / "tiny/report.html").read_text()
    assert "<svg" in report
    assert "bits per byte" in report.lower()
    assert load_job(tmp_path / "tiny/job.yaml").training.steps == 12
    assert len(json.loads((tmp_path / "tiny/plan.json").read_text())["pipelines"]) == 2


def test_a_resumed_run_goes_on_under_another_plan(
    address: str, tmp_path: Path, reference: list[StepRecord]
) -> None:
    done = train(tmp_path, "--stop-after", "5", "--address", address)
    assert done.returncode == 0, done.stderr
    assert steps(tmp_path) == [1, 2, 3, 4, 5]
    other_plan = ("parallelism.pipelines=1", "parallelism.stages=3")
    done = train(tmp_path, "--resume", "--address", address, sets=other_plan)
    assert done.returncode == 0, done.stderr
    assert_curve(tmp_path, reference)
    assert len(events(tmp_path, "generation")[-1]["workers"]) == 3


def test_a_killed_worker_costs_no_step_and_is_replaced_while_the_others_train(
    address: str, tmp_path: Path
) -> None:
    longer = ("training.steps=150",)  # so that it is not over before the kill
    with training(tmp_path, "--address", address, sets=longer) as process:
        wait_until(lambda: events(tmp_path, "checkpoint"), process)
        os.kill(events(tmp_path, "generation")[0]["workers"][1]["pid"], signal.SIGKILL)
        _, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    first, second, *_ = events(tmp_path, "generation")
    survivors = {w["pid"] for w in first["workers"]} - {first["workers"][1]["pid"]}
    assert {w["pid"] for w in second["workers"]} == survivors, "the same processes go on"
    (failure,) = events(tmp_path, "failure")
    assert "rank 1" in failure["message"]
    restored = events(tmp_path, "restore")[0]
    assert restored["step"] >= failure["step"], "what one survivor committed, all commit"
    assert (restored["lost_steps"], restored["source"]) == (0, "memory")
    recovery = events(tmp_path, "recovery")[0]
    assert recovery["step"] == restored["step"] + 1
    assert {
        "detection_s", "settle_s", "plan_s", "transfer_s", "build_s", "first_commit_s",
    } <= set(recovery)  # fmt: skip
    job = load_job(write_job(tmp_path), longer)
    assert_curve(tmp_path, run_reference(job, job.dims(VOCAB)), upto=150)


BROKEN = """
import sys
import ray
from ray_train_geo import GeoError, GeoTrainer

def break_step_3():
    from ray_train_geo.training.executor import StageExecutor
    run = StageExecutor.run
    def broken(self, step, *rest):
        if step == 3:
            raise ValueError("a bug of step 3")
        return run(self, step, *rest)
    StageExecutor.run = broken

ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False,
         runtime_env={"worker_process_setup_hook": break_step_3})
try:
    GeoTrainer(sys.argv[1], overrides=["run.storage_path=" + sys.argv[2]]).fit()
except GeoError as e:
    print(type(e).__name__, e)
"""


def test_a_workers_exception_is_one_error_with_its_traceback_in_a_file(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", BROKEN, str(write_job(tmp_path)), str(tmp_path)],
        env=environment(RAY_IGNORE_UNHANDLED_ERRORS="1"),
        capture_output=True,
        text=True,
        timeout=120,
    )
    kind, _, message = done.stdout.strip().partition(" ")
    assert kind == "WorkerError", done.stdout + done.stderr
    assert "ValueError: a bug of step 3" in message
    path = message.partition("full traceback: ")[2].rstrip(")")
    text = Path(path).read_text()
    assert "in broken\nValueError: a bug of step 3" in text
    assert "\x1b" not in text, "terminal colours don't belong into a file"
    assert Path(path).parent == tmp_path / "tiny/errors"
    assert steps(tmp_path) == [1, 2], "what was committed stays"
    assert events(tmp_path, "failure") == [], "an error of the job's own is not tried again"
