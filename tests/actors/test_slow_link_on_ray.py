"""A link under a run drops to a tenth: a dip changes nothing, for good it brings a better plan."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Collection, Iterator
from itertools import combinations, pairwise
from pathlib import Path

import pytest
from ray_runs import (
    VOCAB,
    events,
    lines,
    ray_head,
    ray_node,
    steps,
    training,
    wait_until,
    write_job,
)

from ray_train_geo.spec import load_job
from ray_train_geo.training.reference import run_reference

# Most of its time it waits for what must not happen: `make soak` has the time.
pytestmark = [pytest.mark.ray, pytest.mark.soak, pytest.mark.timeout(300)]

REGIONS = ("ohio", "oregon", "tokyo")
USUAL_S = 20.0
"""Until the run knows what is usual: it looks every second."""


@pytest.fixture
def address() -> Iterator[str]:
    """A head that computes nothing, and a node in each region."""
    with contextlib.ExitStack() as stack:
        address, _ = stack.enter_context(ray_head(cpus=0))
        for region in REGIONS:
            stack.enter_context(ray_node(address, 1, region))
        yield address


def write_links(path: Path, slow: Collection[str] = ()) -> None:
    """8 Mbit/s between all regions, and a tenth of it between the two ``slow`` ones."""
    entries = [
        f"{{from: {a}, to: {b}, latency_ms: 5, bandwidth_gbps: {gbps}}}"
        for a, b in combinations(REGIONS, 2)
        for gbps in [0.0008 if slow == {a, b} else 0.008]
    ]
    path.with_suffix(".new").write_text(f"links: [{', '.join(entries)}]")
    os.replace(path.with_suffix(".new"), path)


def test_a_link_that_drops_for_good_is_avoided(address: str, tmp_path: Path) -> None:
    links = tmp_path / "links.yaml"
    write_links(links)
    sets = (
        *("training.steps=5000", "checkpoint.interval=0", "model.tied_embeddings=false"),
        *("parallelism.pipelines=1", "parallelism.stages=3"),
        *("scaling.resources_per_worker={CPU: 1}", "scaling.wait_s=60"),
        *(f"scaling.topology={links}", "scaling.emulate_links=true"),
    )

    def found() -> list[str]:
        kinds = ("link", "search", "straggler")
        return [e["event"] for e in lines(tmp_path, "events.jsonl") if e["event"] in kinds]

    with training(tmp_path, "--address", address, sets=sets) as process:
        wait_until(lambda: len(steps(tmp_path)) >= 5, process)
        before = [w["region"] for w in events(tmp_path, "generation")[0]["workers"]]
        time.sleep(USUAL_S)
        write_links(links, slow=set(before[:2]))
        time.sleep(3)
        write_links(links)
        time.sleep(5)
        assert found() == [], "a dip of three seconds"
        write_links(links, slow=set(before[:2]))
        slow_at = time.time()
        wait_until(lambda: len(events(tmp_path, "generation")) > 1, process)
        reached = steps(tmp_path)[-1]
        wait_until(lambda: steps(tmp_path)[-1] >= reached + 2, process)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err

    after = events(tmp_path, "generation")[-1]
    assert after["time"] - slow_at < 30
    in_order = [w["region"] for w in after["workers"]]
    assert set(before[:2]) not in [set(hop) for hop in pairwise(in_order)]
    (plan,) = events(tmp_path, "plan")[1:]
    assert plan["cause"] == "link"
    assert plan["better_step_s"] < 0.8 * plan["step_s"]
    assert plan["gain_s"] > plan["cost_s"] > 0
    assert all(e["slower"] > 4 for e in events(tmp_path, "link"))

    records = lines(tmp_path, "metrics.jsonl")
    assert [r["step"] for r in records] == list(range(1, len(records) + 1))
    job = load_job(write_job(tmp_path), sets)
    reference = run_reference(job, job.dims(VOCAB), until=len(records))
    for ours, expected in zip(records, reference, strict=True):
        assert ours["loss"] == pytest.approx(expected.loss, rel=1e-4)
