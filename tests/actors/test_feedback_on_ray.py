"""A worker that is killed takes its residual along: the loss curve stays that without the kill."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from ray_runs import events, lines, ray_head, steps, training, wait_until

# Two whole runs: `make soak` has the time.
pytestmark = [pytest.mark.ray, pytest.mark.soak, pytest.mark.timeout(300)]

STEPS, KILLED_AT = 60, 20


def losses(folder: Path, address: str, codec: str, kill: bool) -> list[float]:
    folder.mkdir()
    sets = (
        *(f"training.steps={STEPS}", "training.global_batch=24", "checkpoint.interval=0"),
        *("parallelism.pipelines=3", "parallelism.stages=1", f"codecs.gradients={codec}"),
        *("scaling.resources_per_worker={CPU: 1}", "scaling.max_devices=3"),
    )
    with training(folder, "--address", address, sets=sets) as process:
        if kill:
            wait_until(lambda: len(steps(folder)) >= KILLED_AT, process)
            os.kill(events(folder, "generation")[0]["workers"][1]["pid"], signal.SIGKILL)
        _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert len(events(folder, "failure")) == kill
    assert steps(folder) == list(range(1, STEPS + 1))
    return [record["loss"] for record in lines(folder, "metrics.jsonl")]


@pytest.mark.parametrize("codec", ["topk", "powersgd", "int8"])
def test_a_kill_leaves_the_curve(tmp_path: Path, codec: str) -> None:
    with ray_head(cpus=4) as (address, _):
        without = losses(tmp_path / "without", address, codec, kill=False)
        killed = losses(tmp_path / "killed", address, codec, kill=True)
    worst = max(abs(a / b - 1) for a, b in zip(killed, without, strict=True))
    print(f"\n{codec}: losses with a kill are within {worst:.1e} of those without")
    assert worst < 1e-3
