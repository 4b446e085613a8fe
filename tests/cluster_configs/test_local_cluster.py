"""local-multi-node starts as its header says, trains across its regions, and leaves nothing."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from ray_train_geo.chaos.ports import free_ports

pytestmark = [pytest.mark.ray, pytest.mark.timeout(150)]

CONFIGS = Path(__file__).parents[2] / "cluster_configs"
REGION = "ray.io/availability-region"
BIN = Path(sys.executable).parent
START_DEADLINE_S = 90.0  # 12 s on an idle machine

# Runs in a process of its own: Ray reads its auth settings once per process.
WAIT_FOR_NODES = """
import json, sys, time
import ray
ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
nodes = []
deadline = time.monotonic() + float(sys.argv[3])
while time.monotonic() < deadline and len(nodes) < int(sys.argv[2]):
    time.sleep(0.2)
    nodes = [n for n in ray.nodes() if n["Alive"]]
keys = ("NodeID", "Labels", "Resources")
print(json.dumps([{k: n[k] for k in keys} for n in nodes]))
"""


@dataclass(frozen=True, slots=True)
class LocalCluster:
    address: str
    env: dict[str, str]
    nodes: list[dict[str, Any]]


def processes_of(folder: Path) -> list[str]:
    """Command lines that name ``folder``, which is the cluster's own temp dir."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if str(folder) in line:
                found.append(line)
    return found


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    folder = Path(tempfile.mkdtemp(prefix="rtg", dir="/tmp"))  # socket paths must be short
    port = free_ports(3)
    env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "RTG_PORT": str(port),
        "RTG_TEMP_DIR": str(folder),
        "RTG_DASHBOARD": "false",
    }
    client_env = env | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(folder / "auth_token"),
    }
    log = folder / "start.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            ["bash", str(CONFIGS / "local-multi-node.sh")],
            env=env,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        address = f"127.0.0.1:{port}"
        deadline = time.monotonic() + START_DEADLINE_S
        while not port_is_open(port):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        wait = deadline - time.monotonic()
        waiter = subprocess.run(
            [sys.executable, "-c", WAIT_FOR_NODES, address, "5", str(wait)],
            env=client_env,
            capture_output=True,
            text=True,
            timeout=wait + 30,
        )
        assert waiter.returncode == 0, waiter.stderr + log.read_text()
        yield LocalCluster(address, client_env, json.loads(waiter.stdout))
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=20)
        finally:
            left = processes_of(folder)
            shutil.rmtree(folder, ignore_errors=True)
    assert not left, left


def port_is_open(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_all_nodes_come_up_with_their_labels(cluster: LocalCluster) -> None:
    config = yaml.safe_load((CONFIGS / "local-multi-node.yaml").read_text())
    head_type = config["available_node_types"].pop(config["head_node_type"])
    expected = [head_type["labels"]]
    for node_type in config["available_node_types"].values():
        expected += [node_type["labels"]] * node_type["min_workers"]
    seen = [{k: n["Labels"].get(k) for k in head_type["labels"]} for n in cluster.nodes]
    assert sorted(seen, key=str) == sorted(expected, key=str)
    heads = [n for n in cluster.nodes if "node:__internal_head__" in n["Resources"]]
    assert len(heads) == 1
    assert "CPU" not in heads[0]["Resources"], "the head offers no CPU to stage workers"


def health_check(cluster: LocalCluster, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(BIN / "ray"), "health-check", "--address", cluster.address],
        env=cluster.env | env,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_only_who_has_the_token_gets_in(cluster: LocalCluster) -> None:
    assert health_check(cluster).returncode == 0
    refused = health_check(cluster, RAY_AUTH_TOKEN="0" * 64)  # goes before RAY_AUTH_TOKEN_PATH
    assert refused.returncode != 0
    assert "AuthenticationError" in refused.stderr


def test_a_job_trains_across_both_regions(cluster: LocalCluster, tmp_path: Path) -> None:
    command = [
        str(BIN / "ray-train-geo"),
        *("train", str(CONFIGS / "local-job.yaml"), "--address", cluster.address),
        *("--set", "training.steps=3", "--set", f"run.storage_path={tmp_path}"),
    ]
    result = subprocess.run(command, env=cluster.env, capture_output=True, text=True, timeout=100)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]

    run = tmp_path / "local-multi-node"
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in metrics] in ([0, 1, 2], [1, 2, 3])

    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    workers = next(e for e in events if e["event"] == "generation")["workers"]
    region_of = {n["NodeID"]: n["Labels"][REGION] for n in cluster.nodes}
    assert len(workers) == 4
    assert len({w["node_id"] for w in workers}) >= 2
    assert {w["region"] for w in workers} == {"region-a", "region-b"}
    assert all(w["region"] == region_of[w["node_id"]] for w in workers)
    assert sorted((w["pipeline"], w["stage"]) for w in workers) == [(0, 0), (0, 1), (1, 0), (1, 1)]
