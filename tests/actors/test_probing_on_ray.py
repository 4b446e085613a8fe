"""The network of a live cluster, measured by the command."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from ray_runs import environment, ray_head, ray_node, wait_until

from ray_train_geo.cluster.topology_file import load_topology

pytestmark = [pytest.mark.ray, pytest.mark.timeout(200)]


def probe(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ray_train_geo", "probe", *arguments],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )


def succeeded(*arguments: str) -> subprocess.CompletedProcess[str] | None:
    done = probe(*arguments)
    return done if done.returncode == 0 else None


def test_a_probe_measures_both_directions_and_writes_a_topology(tmp_path: Path) -> None:
    out = tmp_path / "measured.yaml"
    with ray_head(cpus=2) as (address, _):
        alone = probe("--address", address)
        with ray_node(address, 1, "ohio"):
            measured = ("--out", str(out), "--seconds", "0.1", "--json")
            # A node takes a moment to be part of the cluster.
            done = wait_until(lambda: succeeded("--address", address, *measured))
    assert alone.returncode == 2
    assert "a probe needs two nodes, and there is one here" in alone.stderr
    found = json.loads(done.stdout)
    ids = {n["id"] for n in found["nodes"]}
    pairs = {(x["from"], x["to"]) for x in found["links"]}
    assert pairs == {(a, b) for a in ids for b in ids - {a}}
    for link in found["links"]:
        assert 0 < link["latency_s"] < 0.1
        assert link["flow_bytes_per_s"] > 1e7
    topology = load_topology(out)
    assert len(topology.devices) == found["devices"] == 3
    assert set(topology.region_links) == {("local", "ohio"), ("ohio", "local")}
    assert set(topology.node_links) == pairs
