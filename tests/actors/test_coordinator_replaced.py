"""The coordinator is killed, alone and with a worker; then the driver: training goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from ray_runs import (
    VOCAB,
    environment,
    events,
    lines,
    ray_head,
    steps,
    training,
    wait_until,
    write_job,
)

from ray_train_geo.spec import load_job
from ray_train_geo.training.reference import run_reference

pytestmark = [pytest.mark.ray, pytest.mark.timeout(280)]

# A rate at which the order of sums does not show in the loss after a few hundred steps.
SETS = ("training.steps=100000", "training.lr=3.0e-4", "scaling.wait_s=60")


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with ray_head(cpus=2) as (address, _):
        yield address


def cli(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ray_train_geo", *arguments],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )


def coordinators(folder: Path) -> list[int]:
    """Process ids of the run's coordinators, one after the other."""
    told = lines(folder, "events.jsonl")
    return [e["pid"] for e in told if e["event"] in ("start", "coordinator")]


def workers(folder: Path) -> list[int]:
    return [w["pid"] for w in events(folder, "generation")[-1]["workers"]]


def kill_coordinator(folder: Path) -> None:
    os.kill(coordinators(folder)[-1], signal.SIGKILL)


def assert_each_step_once_with_the_reference_loss(folder: Path) -> None:
    records = lines(folder, "metrics.jsonl")
    assert [r["step"] for r in records] == list(range(1, len(records) + 1))
    job = load_job(write_job(folder), SETS)
    until = min(len(records), events(folder, "coordinator")[-1]["step"] + 50)
    reference = run_reference(job, job.dims(VOCAB), until=until)
    for ours, expected in zip(records, reference, strict=False):
        assert ours["loss"] == pytest.approx(expected.loss, rel=1e-4)


def assert_nothing_is_left(pids: list[int]) -> None:
    wait_until(lambda: not any(psutil.pid_exists(pid) for pid in pids))


def test_the_coordinator_is_killed_and_then_another_with_a_worker(
    address: str, tmp_path: Path
) -> None:
    with training(tmp_path, "--address", address, sets=SETS) as process:
        wait_until(lambda: len(steps(tmp_path)) >= 3, process)
        first = workers(tmp_path)
        kill_coordinator(tmp_path)
        (came,) = wait_until(lambda: events(tmp_path, "coordinator"), process)
        wait_until(lambda: steps(tmp_path)[-1] > came["step"], process)
        assert workers(tmp_path) == first
        assert len(events(tmp_path, "generation")) == 1, "they trained on"

        os.kill(first[-1], signal.SIGKILL)
        kill_coordinator(tmp_path)
        recovery = wait_until(lambda: events(tmp_path, "recovery"), process)[0]
        wait_until(lambda: len(workers(tmp_path)) == 4, process)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "stopped after step" in out, "the driver has followed all three"
    assert [e["adopted"] for e in events(tmp_path, "coordinator")] == [4, 3]
    assert recovery["generation"] == 2
    assert {r["lost_steps"] for r in events(tmp_path, "restore")} == {0}
    last = steps(tmp_path)[-1]
    manifest = tmp_path / f"tiny/checkpoints/step-{last:08d}/manifest.json"
    assert json.loads(manifest.read_text())["step"] == last
    assert_each_step_once_with_the_reference_loss(tmp_path)
    assert_nothing_is_left([*coordinators(tmp_path), *first, *workers(tmp_path)])


def test_a_killed_drivers_run_goes_on_if_it_shall(address: str, tmp_path: Path) -> None:
    sets = (*SETS, "run.on_driver_exit=continue", "run.driver_patience_s=1")
    with training(tmp_path, "--address", address, sets=sets) as process:
        wait_until(lambda: steps(tmp_path), process)
        process.kill()
        process.wait()
        before = steps(tmp_path)[-1]
        kill_coordinator(tmp_path)
        wait_until(lambda: events(tmp_path, "coordinator"))
        wait_until(lambda: steps(tmp_path)[-1] > before)
        done = cli("stop", str(tmp_path / "tiny"), "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["phase"] == "stopped"
    assert_each_step_once_with_the_reference_loss(tmp_path)
    assert_nothing_is_left([*coordinators(tmp_path), *workers(tmp_path)])
    again = cli("attach", str(tmp_path / "tiny"))
    assert again.returncode == 2
    assert "no run is going on" in again.stderr


def test_a_killed_drivers_run_stops_in_good_order_by_default(address: str, tmp_path: Path) -> None:
    sets = (*SETS, "run.driver_patience_s=2")
    with training(tmp_path, "--address", address, sets=sets) as process:
        wait_until(lambda: steps(tmp_path), process)
        process.kill()
        process.wait()
        (end,) = wait_until(lambda: events(tmp_path, "finish"))
    assert end["phase"] == "stopped"
    assert events(tmp_path, "stop")[0]["reason"] == "the driver is gone"
    manifest = json.loads((Path(end["checkpoint"]) / "manifest.json").read_text())
    assert manifest["step"] == steps(tmp_path)[-1]
    assert_nothing_is_left([*coordinators(tmp_path), *workers(tmp_path)])
