"""A notice of the cloud drains the node: the watcher by itself, and on a real Ray cluster."""

from __future__ import annotations

import contextlib
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import fake_metadata as fake
import psutil
import pytest
from fake_metadata import serving
from ray_runs import environment

from ray_train_geo.actors import node_watcher
from ray_train_geo.actors.node_watcher import NodeWatcher, RayNode, find_node
from ray_train_geo.cluster.notices import MetadataError, Notice
from ray_train_geo.errors import ClusterError

PREEMPTION = Notice("preemption", 2e9, "aws", "spot instance-action terminate")
REBALANCE = Notice("rebalance", math.inf, "aws", "rebalance recommendation")
NODE = "0123456789abcdef"


class FakeNode:
    """Notes what it is told; raises ``errors`` first."""

    id = NODE

    def __init__(self, *errors: ClusterError, alive: bool = True) -> None:
        self.errors = list(errors)
        self.drains = list[Notice]()
        self.is_alive = alive

    def drain(self, notice: Notice) -> None:
        if self.errors:
            raise self.errors.pop(0)
        self.drains.append(notice)

    def alive(self) -> bool:
        if self.errors:
            raise self.errors.pop(0)
        return self.is_alive


def watch(
    node: FakeNode, *polls: Notice | MetadataError | None, **settings: Any
) -> tuple[Notice | None, list[str]]:
    """Run a watcher through these answers of the cloud, and end it by SIGTERM twice.

    Returns:
        What the watcher returned and the lines that it said.
    """
    answers, said = iter(polls), list[str]()
    left = len(polls)

    def poll() -> Notice | None:
        answer = next(answers)
        if isinstance(answer, MetadataError):
            raise answer
        return answer

    def terminated(seconds: float) -> bool:
        nonlocal left
        left -= 1
        return left <= 0

    watcher = NodeWatcher(node, poll, say=said.append, **settings)
    return watcher.run(terminated), said


def test_a_notice_drains_once() -> None:
    node = FakeNode()
    last, said = watch(node, None, PREEMPTION, PREEMPTION, PREEMPTION, grace_s=1e9)
    assert node.drains == [PREEMPTION]
    assert last == PREEMPTION
    assert len(said) == 1
    assert said[0].startswith(f"draining node {NODE}: aws spot instance-action terminate (")


def test_a_deadline_that_every_poll_counts_anew_is_the_first_one() -> None:
    node = FakeNode(ClusterError("down"))
    polls = [Notice("preemption", 2e9 + k, "gcp", "preempted TRUE") for k in range(4)]
    watch(node, *polls, grace_s=1e9)
    assert node.drains == [polls[0]]


def test_a_recommendation_drains_only_if_asked_to() -> None:
    node = FakeNode()
    _, said = watch(node, REBALANCE, REBALANCE, PREEMPTION, grace_s=1e9)
    assert node.drains == [PREEMPTION]
    assert said[0] == "ignored without --rebalance: rebalance recommendation"
    assert len(said) == 2


def test_a_more_urgent_notice_drains_again() -> None:
    node = FakeNode()
    watch(node, REBALANCE, REBALANCE, PREEMPTION, REBALANCE, rebalance=True, grace_s=1e9)
    assert node.drains == [REBALANCE, PREEMPTION]


def test_errors_are_said_once_and_tried_again() -> None:
    slow = MetadataError("metadata is slow")
    node = FakeNode(ClusterError("Ray is down"), ClusterError("Ray is down"))
    _, said = watch(node, slow, slow, None, PREEMPTION, None, None, grace_s=1e9)
    assert said[:4] == [
        "trouble, still trying: metadata is slow",
        "metadata server: well again",
        "trouble, still trying: Ray is down",
        "Ray: well again",
    ]
    assert node.drains == [PREEMPTION]


def test_sigterm_drains_for_as_long_as_is_left() -> None:
    node = FakeNode()
    last, said = watch(node, None, grace_s=12)
    assert node.drains == [last]
    assert last.source == "SIGTERM"
    assert last.deadline_unix_s == pytest.approx(time.time() + 12, abs=5)
    assert "SIGTERM 12 s are left" in said[-1]


def test_sigterm_ends_the_watcher_also_when_ray_is_down() -> None:
    down = [ClusterError("Ray is down")] * 1000
    assert watch(FakeNode(*down), None, grace_s=0)[0] is None
    assert watch(FakeNode(*down), None, grace_s=1e9)[0] is None, "a second one ends it at once"


def test_the_watcher_ends_with_its_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_watcher, "_ALIVE_EVERY_S", 0.0)
    node = FakeNode(ClusterError("Ray is down"), alive=False)
    last, said = watch(node, None, None, None, None)
    assert last is None
    assert said == [
        "trouble, still trying: Ray is down",
        "Ray: well again",
        f"node {NODE} has left Ray: nothing left to watch",
    ]


def info(number: int, address: str, head: bool = False) -> Any:
    return SimpleNamespace(
        node_id=bytes([number]) * 4, node_manager_address=address, is_head_node=head
    )


@pytest.fixture
def cluster_of(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def pretend(*nodes: Any) -> None:
        monkeypatch.setattr(node_watcher, "_live_nodes", lambda address: list(nodes))

    return pretend


def test_the_node_is_the_one_with_an_address_of_this_machine(cluster_of: Callable) -> None:
    cluster_of(info(1, "198.51.100.1", head=True), info(2, "127.0.0.1"))
    assert find_node("198.51.100.1:6379") == RayNode("02020202", "198.51.100.1:6379", False)


@pytest.mark.parametrize("name", ["01010101", "198.51.100.1"])
def test_the_node_can_be_named(cluster_of: Callable, name: str) -> None:
    cluster_of(info(1, "198.51.100.1", head=True), info(2, "127.0.0.1"))
    assert find_node("198.51.100.1:6379", name) == RayNode("01010101", "198.51.100.1:6379", True)


def test_a_node_that_is_not_there_or_not_the_only_one(cluster_of: Callable) -> None:
    cluster_of(info(1, "127.0.0.1"), info(2, "127.0.0.1"))
    with pytest.raises(ClusterError, match="give one by --node ID: 01010101, 02020202"):
        find_node("198.51.100.1:6379")
    cluster_of(info(1, "198.51.100.1"))
    with pytest.raises(ClusterError, match=r"its nodes: 01010101 at 198\.51\.100\.1"):
        find_node("198.51.100.1:6379")


def test_no_control_store_is_told_at_once() -> None:
    began = time.monotonic()
    with pytest.raises(ClusterError, match=r"127\.0\.0\.1:1 does not answer"):
        RayNode(NODE, "127.0.0.1:1", False).drain(PREEMPTION)
    assert time.monotonic() - began < 3


# A real cluster.

CLUSTER = """
import json, sys, time
import ray
from ray._raylet import GcsClient
from ray.cluster_utils import Cluster

cluster = Cluster()
common = {"object_store_memory": 80_000_000, "include_log_monitor": False, "wait": False}
cluster.add_node(num_cpus=0, include_dashboard=False, no_monitor=True, **common)
node = cluster.add_node(num_cpus=1, **common)
print(json.dumps({"address": cluster.address, "node": node.node_id}), flush=True)
ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")

@ray.remote(num_cpus=1)
class Stage:  # Ray ends an idle node as soon as it is drained
    def ready(self):
        return True

stage = Stage.remote()
ray.get(stage.ready.remote())
print("busy", flush=True)
gcs = GcsClient(address=cluster.address)
while not (draining := gcs.get_draining_nodes()):
    time.sleep(0.005)
print(json.dumps({"at": time.time(), "draining": draining}), flush=True)
sys.stdin.read()
ray.shutdown()
cluster.shutdown()
"""

WATCH = "import typer; from ray_train_geo.watch_command import watch_node; typer.run(watch_node)"


@contextlib.contextmanager
def python(code: str, *arguments: str, **env: str) -> Iterator[subprocess.Popen[str]]:
    """A Python process; it and its children are gone afterwards."""
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        env=environment(**env),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    children = list[psutil.Process]()
    try:
        yield process
        with contextlib.suppress(psutil.Error):
            children = psutil.Process(process.pid).children(recursive=True)
        process.communicate(timeout=20)
    finally:
        with contextlib.suppress(psutil.Error):
            children += psutil.Process(process.pid).children(recursive=True)
        for child in [*children, process]:
            with contextlib.suppress(psutil.Error):
                child.kill()
        process.wait()


@pytest.mark.ray
@pytest.mark.timeout(120)
def test_a_preempted_node_drains_within_two_seconds() -> None:
    with (
        tempfile.TemporaryDirectory(prefix="rtg", dir="/tmp", ignore_cleanup_errors=True) as temp,
        serving(fake.aws()) as metadata,
        python(CLUSTER, RAY_TMPDIR=temp) as cluster,
    ):
        up = json.loads(cluster.stdout.readline())
        flags = ["--cloud=aws", f"--metadata-url={metadata.url}", f"--node={up['node']}"]
        with python(WATCH, *flags, "--poll-s=0.5", RAY_ADDRESS=up["address"]) as watcher:
            assert f"watching aws's notices for node {up['node']}" in watcher.stdout.readline()
            assert cluster.stdout.readline() == "busy\n"
            given_at = time.time()
            when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(given_at + 120))
            metadata.answers[fake.AWS_ACTION] = json.dumps({"action": "terminate", "time": when})
            seen = json.loads(cluster.stdout.readline())
            assert seen["at"] - given_at < 2.0
            assert list(seen["draining"]) == [up["node"]]
            assert seen["draining"][up["node"]] / 1000 == pytest.approx(given_at + 120, abs=1)
            assert "draining node" in watcher.stdout.readline()
            watcher.terminate()
        assert watcher.returncode == 0
