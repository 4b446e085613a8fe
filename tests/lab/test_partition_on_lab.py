"""A region is cut off for 15 s, then healed: the run goes on without it, and takes it back."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from labs import needs_lab, until
from test_training_on_lab import JOB, four_hosts, lines

from ray_train_geo.lab.lab import Lab
from ray_train_geo.lab.ray_nodes import RayOnLab
from ray_train_geo.spec import load_job
from ray_train_geo.training.reference import run_reference

# Cut, heal and return take a minute: `make soak` has the time.
pytestmark = [pytest.mark.ray, pytest.mark.soak, pytest.mark.timeout(400)]

CUT_S = 15.0
VOCAB = 257


def test_a_region_that_is_cut_off_comes_back(tmp_path: Path) -> None:
    needs_lab()
    (tmp_path / "job.yaml").write_text(JOB)
    run = tmp_path / "tiny"
    sets = (
        f"run.storage_path={tmp_path}",
        "scaling.probe_s=10",
        "training.steps=100000",
        "training.lr=5e-4",
    )

    def of_kind(kind: str) -> list[dict[str, Any]]:
        return [e for e in lines(run / "events.jsonl") if e["event"] == kind]

    def steps() -> list[dict[str, Any]]:
        return lines(run / "metrics.jsonl")

    with contextlib.ExitStack() as stack:
        lab = stack.enter_context(Lab(four_hosts()))
        cluster = RayOnLab(lab)
        cluster.start()
        command = cluster.train_command(tmp_path / "job.yaml", sets)
        log = stack.enter_context((tmp_path / "log").open("wb"))
        training = cluster.popen(0, command, stdout=log, stderr=subprocess.STDOUT)
        stack.callback(training.wait)
        stack.callback(training.kill)

        def wait(condition: Any, seconds: float) -> None:
            until(lambda: condition() or training.poll() is not None, seconds)
            assert training.poll() is None, (tmp_path / "log").read_text()

        wait(lambda: len(steps()) >= 20, 120)
        lab.cut("east")
        cut = time.time()
        time.sleep(CUT_S)
        lab.heal("east")
        healed = time.time()
        wait(lambda: hosts(of_kind("generation")[-1]) == {"a", "b", "c", "d"}, 150)
        reached = len(steps())
        wait(lambda: len(steps()) >= reached + 10, 60)
        training.send_signal(signal.SIGTERM)
        assert training.wait(60) == 0, (tmp_path / "log").read_text()

    generations = of_kind("generation")
    assert hosts(generations[0]) == {"a", "b", "c", "d"}
    without = [g for g in generations if cut < g["time"] < healed]
    assert without
    assert hosts(without[-1]) == {"a", "b"}
    assert all(e["lost_steps"] == 0 for e in of_kind("restore"))
    records = steps()
    assert [r["step"] for r in records] == list(range(1, len(records) + 1))
    between = [r for r in records if without[-1]["time"] < r["time"] < healed]
    assert between, "it trained while the region was away"
    job = load_job(tmp_path / "job.yaml", sets)
    expected = [r.loss for r in run_reference(job, job.dims(VOCAB), until=len(records))]
    assert [r["loss"] for r in records] == pytest.approx(expected, rel=1e-4)
    back = next(g["time"] for g in generations if g["time"] > healed and len(hosts(g)) == 4)
    first = next(r["time"] for r in records if r["time"] > without[0]["time"])
    print(
        f"\ncut: next step after {first - cut:.1f} s, {len(between)} steps without the region; "
        f"healed: taken back after {back - healed:.1f} s; {len(records)} steps, none lost, losses "
        f"within {max(abs(r['loss'] / e - 1) for r, e in zip(records, expected, strict=True)):.1e}"
    )


def hosts(generation: dict[str, Any]) -> set[str]:
    return {w["host"] for w in generation["workers"]}
