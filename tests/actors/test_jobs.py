"""``ray job submit`` and ``ray-train-geo submit`` against a running head."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray_runs import BIN, environment, events, ray_head, steps, wait_until, write_job

pytestmark = [pytest.mark.ray, pytest.mark.timeout(200)]


@pytest.fixture(scope="module")
def dashboard() -> Iterator[str]:
    with ray_head(dashboard=True) as (_, url):
        yield url


def test_submit_streams_the_log_to_the_end(dashboard: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "ray_train_geo", "submit", str(write_job(tmp_path))),
            *("--address", dashboard, "--set", f"run.storage_path={tmp_path}"),
        ],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "finished after step 12" in done.stdout
    assert steps(tmp_path) == list(range(1, 13))


def test_a_stopped_job_leaves_a_complete_checkpoint(dashboard: str, tmp_path: Path) -> None:
    ray = [str(BIN / "ray"), "job"]
    address = ["--address", dashboard]
    entrypoint = [
        *("ray-train-geo", "train", str(write_job(tmp_path))),
        *("--set", f"run.storage_path={tmp_path}", "--set", "training.steps=100000"),
        *("--set", "checkpoint.interval=0"),
    ]
    job = "rtg-stopped"
    subprocess.run(
        [*ray, "submit", *address, "--no-wait", "--submission-id", job, "--", *entrypoint],
        env=environment(),
        check=True,
        capture_output=True,
        timeout=60,
    )
    wait_until(lambda: len(steps(tmp_path)) >= 2)
    subprocess.run(
        [*ray, "stop", *address, job], env=environment(), check=True, capture_output=True,
        timeout=60,
    )  # fmt: skip
    wait_until(lambda: events(tmp_path, "finish"))
    last = steps(tmp_path)[-1]
    assert events(tmp_path, "finish")[0]["phase"] == "stopped"
    manifest = tmp_path / f"tiny/checkpoints/step-{last:08d}/manifest.json"
    assert json.loads(manifest.read_text())["step"] == last
