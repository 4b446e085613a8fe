"""A job trains over slow links on emulated hosts, and loses one of them."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from labs import needs_lab, until

from ray_train_geo.cluster.topology import Device, Link, Topology
from ray_train_geo.lab.lab import Lab
from ray_train_geo.lab.ray_nodes import RayOnLab

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]

STEPS = 30
TEXT = Path(__file__).parents[2] / "LICENSE"
JOB = f"""
model: {{layers: 4, dim: 32, heads: 4}}
data: {{path: {TEXT}}}
training: {{steps: {STEPS}, global_batch: 8, microbatch: 2, seq_len: 32, lr: 3.0e-3, seed: 3}}
parallelism: {{pipelines: 2, stages: 2}}
checkpoint: {{interval: 0}}
run: {{name: tiny}}
"""


def four_hosts() -> Topology:
    """Two in each of two regions."""
    devices = tuple(
        Device(f"{node}/0", node, region)
        for node, region in (("a", "west"), ("b", "west"), ("c", "east"), ("d", "east"))
    )
    far = Link(0.03, 5e6)
    return Topology(
        devices,
        region_links={
            ("west", "west"): Link(0.001, 5e7),
            ("east", "east"): Link(0.001, 5e7),
            ("west", "east"): far,
            ("east", "west"): far,
        },
    )


def lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a JSON lines file."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(x) for x in text.splitlines(keepends=True) if x.endswith("\n")]


def test_a_host_without_power_costs_no_step(tmp_path: Path) -> None:
    needs_lab()
    (tmp_path / "job.yaml").write_text(JOB)
    run = tmp_path / "tiny"
    with Lab(four_hosts()) as lab:
        cluster = RayOnLab(lab)
        cluster.start()
        sets = (f"run.storage_path={tmp_path}", "scaling.probe_s=10")
        command = cluster.train_command(tmp_path / "job.yaml", sets)
        training = cluster.popen(0, command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        try:
            until(lambda: len(lines(run / "metrics.jsonl")) >= 3 or training.poll(), 120)
            lab.kill("d")
            said, _ = training.communicate(timeout=150)
        finally:
            training.kill()
            training.wait()
    assert training.returncode == 0, said.decode()
    steps = lines(run / "metrics.jsonl")
    assert [s["step"] for s in steps] == list(range(1, STEPS + 1))
    events = lines(run / "events.jsonl")
    (topology,) = (e for e in events if e["event"] == "topology")
    host = {w["node_id"]: w["host"] for e in events for w in e.get("workers", ())}
    found = {(host[link["from"]], host[link["to"]]): link for link in topology["links"]}
    assert len(found) == 12
    for pair in (("a", "c"), ("d", "b")):
        assert found[pair]["latency_s"] == pytest.approx(0.03, rel=0.2)
        assert found[pair]["bandwidth_bytes_per_s"] == pytest.approx(5e6, rel=0.2)
    assert found["a", "b"]["bandwidth_bytes_per_s"] > 1e7
    generations = [e for e in events if e["event"] == "generation"]
    hosts = {w["host"] for w in generations[0]["workers"]}
    assert hosts == {"a", "b", "c", "d"}
    regions = {w["host"]: w["region"] for w in generations[0]["workers"]}
    assert regions["a"] == "west"
    assert regions["c"] == "east"
    assert "d" not in {w["host"] for g in generations[1:] for w in g["workers"]}
    assert [e["lost_steps"] for e in events if e["event"] == "restore"] == [0]
    assert [e["source"] for e in events if e["event"] == "restore"] == ["memory"]
