"""Nodes die, come and are drained under a run of one pipeline: every step once, the same curve."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray_runs import (
    VOCAB,
    environment,
    events,
    lines,
    ray_head,
    ray_node,
    raylet_of,
    steps,
    training,
    wait_until,
    write_job,
)

from ray_train_geo.spec import load_job
from ray_train_geo.training.reference import run_reference

pytestmark = [pytest.mark.ray, pytest.mark.timeout(200)]

SETS = (
    "training.steps=5000",
    "parallelism.pipelines=1",
    "scaling.resources_per_worker={CPU: 1}",
    "scaling.wait_s=60",
    "checkpoint.interval=0",
)
DRAIN = """
import sys, time
from ray._raylet import GcsClient
deadline_ms = int((time.time() + 60) * 1000)
GcsClient(address=sys.argv[1]).drain_node(sys.argv[2], 2, "spot notice", deadline_ms)
"""


@pytest.fixture
def cluster() -> Iterator[tuple[str, dict[str, subprocess.Popen[bytes]]]]:
    """A head that computes nothing, and three nodes in regions of their own."""
    with contextlib.ExitStack() as stack:
        address, _ = stack.enter_context(ray_head(cpus=0))
        nodes = {}
        for region in ("ohio", "oregon", "tokyo"):
            nodes[region] = stack.enter_context(ray_node(address, 1, region))
        yield address, nodes


def test_a_node_dies_another_takes_its_place_and_is_drained(
    cluster: tuple[str, dict[str, subprocess.Popen[bytes]]], tmp_path: Path
) -> None:
    address, nodes = cluster
    with training(tmp_path, "--address", address, sets=SETS) as process:
        wait_until(lambda: len(steps(tmp_path)) >= 5, process)
        first = events(tmp_path, "generation")[0]["workers"]
        killed_at = time.time()
        raylet_of(nodes[first[1]["region"]]).kill()
        recovery = wait_until(lambda: events(tmp_path, "recovery"), process)[0]
        joined = wait_until(lambda: events(tmp_path, "reshape"), process)[0]
        second, third = events(tmp_path, "generation")[1:3]
        drained = next(w for w in third["workers"] if w["pid"] != first[0]["pid"])
        subprocess.run(
            [sys.executable, "-c", DRAIN, address, drained["node_id"]],
            env=environment(),
            check=True,
            timeout=60,
        )
        left = wait_until(lambda: events(tmp_path, "reshape")[1:], process)[0]
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err

    assert [w["pid"] for w in second["workers"]] == [first[0]["pid"]], "the survivor goes on alone"
    assert recovery["time"] - killed_at < 13, "sooner than Ray knows of the death"
    assert len(third["workers"]) == 2
    assert drained["region"] not in {w["region"] for w in first}, "the node that was spare"
    assert "drained" in left["reason"]
    assert left["step"] > joined["step"]
    (last,) = events(tmp_path, "generation")[3:]
    # What is planned has its links made while the others train; what is not can't.
    assert [g["links_ahead"] for g in (second, third, last)] == [False, True, True]
    assert [w["pid"] for w in last["workers"]] == [first[0]["pid"]]

    restored = events(tmp_path, "restore")
    assert {r["source"] for r in restored} == {"memory"}
    assert restored[0]["lost_steps"] <= 1, "at most the interval of in-memory copies"
    assert [r["lost_steps"] for r in restored[1:]] == [0, 0]

    records = lines(tmp_path, "metrics.jsonl")
    assert [r["step"] for r in records] == list(range(1, len(records) + 1))
    job = load_job(write_job(tmp_path), SETS)
    reference = run_reference(job, job.dims(VOCAB), until=len(records))
    for ours, expected in zip(records, reference, strict=True):
        assert ours["loss"] == pytest.approx(expected.loss, rel=1e-4)
