"""The main job on Ray, through the command line: what it leaves behind, stops, losses, errors."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from ray_runs import (
    VOCAB,
    environment,
    events,
    lines,
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


def test_a_run_leaves_its_whole_record(tmp_path: Path, reference: list[StepRecord]) -> None:
    done = train(tmp_path, "--json")
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


def test_sigterm_saves_and_resume_goes_on_under_another_plan(
    tmp_path: Path, reference: list[StepRecord]
) -> None:
    with training(tmp_path, sets=("training.steps=5000",)) as process:
        wait_until(lambda: len(steps(tmp_path)) >= 3, process)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "stopped after step" in out
    stopped_at = steps(tmp_path)[-1]
    manifest = tmp_path / f"tiny/checkpoints/step-{stopped_at:08d}/manifest.json"
    assert json.loads(manifest.read_text())["step"] == stopped_at

    # The same curve as a run that was never stopped; its schedule is that of 12 steps.
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    done = train(fresh, "--stop-after", "5")
    assert done.returncode == 0, done.stderr
    assert steps(fresh) == [1, 2, 3, 4, 5]
    other_plan = ("parallelism.pipelines=1", "parallelism.stages=3")
    done = train(fresh, "--resume", sets=other_plan)
    assert done.returncode == 0, done.stderr
    assert_curve(fresh, reference)
    assert len(events(fresh, "generation")[-1]["workers"]) == 3


def test_a_killed_worker_costs_only_the_steps_since_the_checkpoint(
    tmp_path: Path,
) -> None:
    longer = ("training.steps=150",)  # so that it is not over before the kill
    with training(tmp_path, sets=longer) as process:
        wait_until(lambda: events(tmp_path, "checkpoint"), process)
        os.kill(events(tmp_path, "generation")[0]["workers"][1]["pid"], signal.SIGKILL)
        out, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    assert len(events(tmp_path, "generation")) == 2, f"it was over before the kill: {out}"
    assert "rank 1" in events(tmp_path, "failure")[0]["message"]
    assert events(tmp_path, "restore")[0]["step"] >= 4
    job = load_job(write_job(tmp_path), longer)
    assert_curve(tmp_path, run_reference(job, job.dims(VOCAB)), upto=150)


def test_a_diverged_run_is_one_clear_error(tmp_path: Path) -> None:
    done = train(tmp_path, sets=("training.lr=1.0e+30", "training.grad_clip=0"))
    assert done.returncode == 1
    assert done.stderr.count("error:") == 1
    assert "Lower training.lr" in done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert events(tmp_path, "error")[0]["kind"] == "DivergedError"
    assert events(tmp_path, "finish")[0]["phase"] == "failed"


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
