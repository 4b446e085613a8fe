"""Runs of the real command line on real Ray clusters, for the tests of this folder."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from ray_train_geo.chaos.ports import free_ports

BIN = Path(sys.executable).parent
TEXT = Path(__file__).parents[2] / "LICENSE"
VOCAB = 257

JOB = f"""
model: {{layers: 4, dim: 32, heads: 4, dropout: 0.1}}
data: {{path: {TEXT}}}
training: {{steps: 12, global_batch: 8, microbatch: 2, seq_len: 32, lr: 3.0e-3, warmup_steps: 2,
  grad_clip: 0.5, seed: 3}}
parallelism: {{pipelines: 2, stages: 2}}
scaling: {{resources_per_worker: {{CPU: 0.25}}}}
checkpoint: {{interval: 4}}
run: {{name: tiny}}
"""


def environment(**more: str) -> dict[str, str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    kept = {k: v for k, v in os.environ.items() if k.startswith("RAY_TRAIN_GEO")}
    ours = {
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "RAY_AUTH_MODE": "disabled",
        "RAY_worker_niceness": "0",  # Ray's 15 starves workers where others use the machine, too
    }
    return clean | kept | ours | more


def write_job(folder: Path) -> Path:
    job = folder / "job.yaml"
    job.write_text(JOB)
    return job


def command(folder: Path, *arguments: str, sets: tuple[str, ...] = ()) -> list[str]:
    settings = [f"run.storage_path={folder}", *sets]
    return [
        sys.executable,
        *("-m", "ray_train_geo", "train", str(write_job(folder)), *arguments),
        *(part for setting in settings for part in ("--set", setting)),
    ]


def train(
    folder: Path, *arguments: str, sets: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(folder, *arguments, sets=sets),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )


@contextlib.contextmanager
def training(
    folder: Path, *arguments: str, sets: tuple[str, ...] = ()
) -> Iterator[subprocess.Popen[str]]:
    """A run under way; its processes are gone afterwards, and a failure tells its last events."""
    process = subprocess.Popen(
        command(folder, *arguments, sets=sets),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    except BaseException as e:
        for event in lines(folder, "events.jsonl")[-20:]:
            e.add_note(str(event))
        raise
    finally:
        with contextlib.suppress(psutil.Error):
            for child in psutil.Process(process.pid).children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    child.kill()
        process.kill()
        process.communicate()


def lines(folder: Path, name: str) -> list[dict[str, Any]]:
    path = folder / "tiny" / name
    if not path.exists():
        return []
    return [
        json.loads(line)
        for line in path.read_text().splitlines(keepends=True)
        if line.endswith("\n")
    ]


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [e for e in lines(folder, "events.jsonl") if e["event"] == kind]


def wait_until(condition: Callable[[], Any], process: subprocess.Popen[str] | None = None) -> Any:
    """What ``condition`` returns once it is true."""
    deadline = time.monotonic() + 90
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not happen within 90 s"
        assert process is None or process.poll() is None, process.communicate()
        time.sleep(0.05)
    return found


def steps(folder: Path) -> list[int]:
    return [record["step"] for record in lines(folder, "metrics.jsonl")]


@contextlib.contextmanager
def ray_head(cpus: int = 4, dashboard: bool = False) -> Iterator[tuple[str, str]]:
    """A Ray head in a session of its own: (address, URL of the dashboard that jobs go to).

    Args:
        dashboard: start it; that alone is a dozen processes.
    """
    port, web = free_ports(), free_ports()
    with tempfile.TemporaryDirectory(prefix="rtg", dir="/tmp", ignore_cleanup_errors=True) as temp:
        head = subprocess.Popen(
            [
                str(BIN / "ray"), "start", "--head", "--block", "--disable-usage-stats",
                "--node-ip-address=127.0.0.1", f"--port={port}", f"--num-cpus={cpus}",
                f"--include-dashboard={str(dashboard).lower()}", f"--dashboard-port={web}",
                f"--ray-client-server-port={free_ports()}", "--no-monitor",
                "--include-log-monitor=false", "--dashboard-agent-listen-port=0",
                f"--dashboard-agent-grpc-port={free_ports()}", "--object-store-memory=80000000",
                f"--temp-dir={temp}",
            ],
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        try:
            wait_until(lambda: _open(port) and (_open(web) or not dashboard))
            yield f"127.0.0.1:{port}", f"http://127.0.0.1:{web}"
        finally:
            end_node(head)


@contextlib.contextmanager
def ray_node(address: str, cpus: int, region: str) -> Iterator[subprocess.Popen[bytes]]:
    """One more node of the cluster at ``address``, once it has joined.

    On a busy machine one in many does not: Ray's processes start with deadlines of their own.
    """
    with tempfile.TemporaryDirectory(prefix="rtgn", dir="/tmp") as temp:
        for tries_left in (2, 1, 0):
            log = Path(temp) / f"{tries_left}.log"
            node = _start_node(address, cpus, region, log)
            if _joined(node, log):
                break
            end_node(node)
            assert tries_left, f"a node did not join: {log.read_text()[-2000:]}"
        try:
            yield node
        finally:
            end_node(node)


def _start_node(address: str, cpus: int, region: str, log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as said:
        return subprocess.Popen(
            [
                str(BIN / "ray"), "start", "--block", f"--address={address}",
                "--node-ip-address=127.0.0.1", f"--num-cpus={cpus}", "--disable-usage-stats",
                f"--labels=ray.io/region={region}", "--object-store-memory=80000000",
                "--dashboard-agent-listen-port=0", f"--dashboard-agent-grpc-port={free_ports()}",
            ],
            env=environment(),
            stdout=said,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip


def _joined(node: subprocess.Popen[bytes], log: Path) -> bool:
    """Wait until Ray says that the node has, or ends, or has taken too long."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and node.poll() is None:
        if b"Ray runtime started" in log.read_bytes():
            return True
        time.sleep(0.1)
    return False


def end_node(node: subprocess.Popen[bytes]) -> None:
    """Kill all processes of a node at once."""
    # Ray gives its processes groups of their own; the session holds them all.
    for process in psutil.process_iter():
        if _session(process.pid) == node.pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, 9)
    node.wait()


def raylet_of(node: subprocess.Popen[bytes]) -> psutil.Process:
    """The raylet of a node, once it runs."""

    def found() -> list[psutil.Process]:
        return [p for p in psutil.Process(node.pid).children() if p.name() == "raylet"]

    return wait_until(found)[0]


def _session(pid: int) -> int:
    try:
        return os.getsid(pid)
    except (ProcessLookupError, PermissionError):
        return -1


def _open(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
