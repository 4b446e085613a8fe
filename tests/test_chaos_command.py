"""``ray-train-geo chaos``: one kill for real, and wrong input refused in one message."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ray_train_geo.cli import app

TEXT = Path(__file__).parents[1] / "LICENSE"

JOB = f"""
model: {{layers: 2, dim: 32, heads: 4}}
data: {{path: {TEXT}}}
training: {{steps: 20000, global_batch: 4, microbatch: 2, seq_len: 32, seed: 3}}
parallelism: {{pipelines: 2, stages: 1}}
checkpoint: {{interval: 0}}
run: {{name: broken}}
"""


def chaos(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    job = folder / "job.yaml"
    job.write_text(JOB)
    command = [sys.executable, "-m", "ray_train_geo", "chaos", str(job), *arguments]
    settings = ["--set", f"run.storage_path={folder}", "--json"]
    return subprocess.run([*command, *settings], capture_output=True, text=True, timeout=400)


@pytest.mark.ray
@pytest.mark.soak
@pytest.mark.timeout(420)
def test_a_worker_is_killed_in_its_backward(tmp_path: Path) -> None:
    done = chaos(tmp_path, "--faults", "kill-worker@phase:backward", "--nodes", "2", "--seed", "1")
    found = json.loads(done.stdout)
    assert done.returncode == 0, (found, done.stderr)
    assert found["phase"] == "stopped"
    (recovery,) = found["recoveries"]
    assert recovery["injection"]["phase"] == "backward"
    assert recovery["noticed_s"] < recovery["commit_s"] < 15
    checks = {check["name"] for check in found["checks"]}
    assert {"steps", "samples", "losses", "processes", "shared memory"} <= checks
    assert found["passed"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--faults", "kill-wroker"], "did you mean kill-worker?"),
        (["--faults", " "], "--faults names none"),
        (["--faults", "join", "--set", "training.precision=bf16"], "trains in fp32"),
        (["--trace", "aws-p3", "--faults", "join"], "--trace says when nodes come and go"),
        (["--faults", "join", "--speedup", "9"], "--speedup is for a --trace, and there is none"),
        (["--trace", "no-such"], "can't read the trace no-such"),
        (["--faults", "fill-disk"], "add --set checkpoint.interval=10"),
    ],
)
def test_wrong_input(tmp_path: Path, arguments: list[str], message: str) -> None:
    job = tmp_path / "job.yaml"
    job.write_text(JOB)
    storage = ["--set", f"run.storage_path={tmp_path}", "--json"]
    result = CliRunner().invoke(app, ["chaos", str(job), *arguments, *storage])
    assert result.exit_code == 2, result.exception
    assert message in json.loads(result.stdout)["error"]["message"]
    assert not (tmp_path / "broken").exists()
