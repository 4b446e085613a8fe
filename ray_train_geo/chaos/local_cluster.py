"""A Ray cluster on this machine that is there to be broken: a head, and nodes that come and go.

The head computes nothing: the coordinator and the driver live there.  Every node is a raylet of its
own with its own share of CPUs, a region label, and a session of processes that can be killed at
once.  Temporary files of all of them are under one folder, which must be empty of ours at the end.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ray_train_geo.chaos.island import Island
from ray_train_geo.chaos.ports import free_ports
from ray_train_geo.chaos.processes import end_session, in_session
from ray_train_geo.errors import ClusterError
from ray_train_geo.observe.phases import FOLDER_VARIABLE

__all__ = ["LocalCluster", "Node", "local_cluster"]

REGIONS = ("east", "west")
_START_S = 120.0
_TRIES = 3
"""A raylet may find a port taken that was free a moment before."""
_POLL_S = 0.02
_LOOPBACK = "127.0.0.1"
_STORE_BYTES = 80_000_000
_STOP_S = 10.0
_JOINED = b"Ray runtime started"
"""What ``ray start`` says once it has."""


@dataclass(eq=False, slots=True)
class Node:
    """One raylet, with its workers.

    Args:
        process: ``ray start --block``, which leads the session of all of the node's processes.
        log: what ``ray start`` says.
        up_s: when it was seen to have joined Ray, in unix seconds.
    """

    name: str
    region: str
    address: str
    process: subprocess.Popen[bytes]
    started_s: float
    log: Path
    up_s: float | None = None

    def is_up(self) -> bool:
        """Whether it has joined Ray, now or before."""
        if self.up_s is None and _JOINED in self.log.read_bytes():
            self.up_s = time.time()
        return self.up_s is not None

    def alive(self) -> bool:
        return self.process.poll() is None

    def has(self, pid: int) -> bool:
        """Whether process ``pid`` is one of this node's."""
        try:
            return os.getsid(pid) == self.process.pid
        except ProcessLookupError:
            return False


class LocalCluster:
    """Made by :func:`local_cluster`.

    Args:
        folder: for everything that its processes write.
        workers_per_node: CPUs of each node; a worker takes one.
        notice_s: from the notice of a drain to the end of the node.
    """

    def __init__(
        self, folder: Path, workers_per_node: int, notice_s: float, network: Island | None
    ) -> None:
        self.folder = folder
        self.workers_per_node = workers_per_node
        self.network = network
        self.phases = folder / "phases"
        self.nodes: list[Node] = []
        self._notice_s = notice_s
        self._wanted: list[tuple[str, str]] = []  # name and region
        self._starting: Node | None = None
        self._named = 0
        self._failures = 0
        for path in (self.phases, folder / "tmp"):
            path.mkdir()
        address = self._new_address()
        port = free_ports()
        self.address = f"{address}:{port}"
        self.head = self._start(
            "head", REGIONS[0], address, "--head", f"--port={port}", "--num-cpus=0",
            "--include-dashboard=false", f"--ray-client-server-port={free_ports()}", "--no-monitor",
            f"--temp-dir={folder / 'r'}",
        )  # fmt: skip
        self._wait_for(self.head)

    # ------------------------------------------------------------------ nodes

    def add_node(self, region: str | None = None) -> str:
        """Start one more node; :meth:`poll` sees to it that one starts after the other.

        Args:
            region: by default the one that has fewer nodes.

        Returns:
            Its name.
        """
        if region is None:
            there = [n.region for n in self.live()] + [region for _, region in self._wanted]
            region = min(REGIONS, key=there.count)
        self._named += 1
        name = f"node{self._named}"
        self._wanted.append((name, region))
        self.poll()
        return name

    def named(self, name: str) -> Node | None:
        """The node of that name, if it has been started and has not ended."""
        return next((n for n in self.nodes if n.name == name), None)

    def withdraw(self, name: str) -> None:
        """The node of that name ends without a word, or is not started any more."""
        self._wanted = [wanted for wanted in self._wanted if wanted[0] != name]
        node = self.named(name)
        if node is not None:
            if node is self._starting:
                self._starting = None  # no failure
            self.kill(node)

    def poll(self) -> None:
        """Go on with what is being started, and forget the nodes that have ended."""
        starting = self._starting
        if starting is not None and starting.alive() and not starting.is_up():
            if time.time() < starting.started_s + _START_S:
                return
            end_session(starting.process.pid)
            starting.process.wait()
        for node in [n for n in self.nodes if not n.alive()]:
            end_session(node.process.pid)  # what ``ray start`` has left behind
            self.nodes.remove(node)
            if node is self._starting and node.up_s is None:
                self._failed(node)
        self._starting = None
        if self._wanted:
            # They share this machine's ports and Ray's session folder: one after the other.
            name, region = self._wanted.pop(0)
            node = self._start(
                name, region, self._new_address(), f"--address={self.address}",
                f"--num-cpus={self.workers_per_node}",
            )  # fmt: skip
            self._starting = node
            self.nodes.append(node)

    def wait(self) -> None:
        """Until all nodes that were asked for are there.

        Raises:
            ClusterError: one did not start.
        """
        while self._wanted or self._starting is not None:
            self.poll()
            time.sleep(_POLL_S)

    def _failed(self, node: Node) -> None:
        self._failures += 1
        if self._failures >= _TRIES:
            raise ClusterError(f"Ray did not start on this machine: {self._last_words(node)}")
        self._wanted.insert(0, (node.name, node.region))

    def _last_words(self, node: Node) -> str:
        log = node.log.read_text(errors="replace").strip()
        return log.splitlines()[-1] if log else f"{node.name} said nothing"

    def live(self) -> list[Node]:
        return [n for n in self.nodes if n.alive()]

    def expected(self) -> int:
        """Nodes that are there or have been asked for."""
        return len(self.live()) + len(self._wanted)

    def node_of(self, pid: int) -> Node | None:
        """The node that process ``pid`` runs on."""
        return next((n for n in self.nodes if n.has(pid)), None)

    def kill(self, node: Node) -> None:
        """All of the node's processes end at once, without a word."""
        end_session(node.process.pid)
        node.process.wait()
        self.poll()

    def drain(self, node: Node) -> None:
        """A notice: ``ray start --block`` drains its node at SIGTERM, and ends when it is empty."""
        node.process.send_signal(signal.SIGTERM)

    def processes(self) -> list[int]:
        """All processes of the cluster."""
        return [pid for n in [self.head, *self.nodes] for pid in in_session(n.process.pid)]

    # ------------------------------------------------------------------ commands

    def environment(self) -> dict[str, str]:
        """For processes of this cluster: nothing of another Ray's, files in its folder."""
        clean = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        ours = {k: v for k, v in os.environ.items() if k.startswith("RAY_TRAIN_GEO")}
        return clean | ours | {
            "PATH": f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}",
            "OMP_NUM_THREADS": "1",
            "RAY_AUTH_MODE": "disabled",
            "RAY_worker_niceness": "0",  # times are measured here: Ray's 15 yields to all others
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": f"{self._notice_s:g}",
            FOLDER_VARIABLE: str(self.phases),
            "TMPDIR": str(self.folder / "tmp"),
            "TORCHINDUCTOR_CACHE_DIR": str(self.folder / "inductor"),
        }  # fmt: skip

    def spawn(
        self, command: list[str], log: Path, address: str | None = None
    ) -> subprocess.Popen[bytes]:
        """Run ``command`` on a node (the head), in a session of its own; output to ``log``."""
        if self.network is not None:
            command = self.network.inside(address or self.head.address, command)
        with log.open("ab") as out:
            return subprocess.Popen(
                command,
                env=self.environment(),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )

    def _start(self, name: str, region: str, address: str, *arguments: str) -> Node:
        command = [
            str(Path(sys.executable).parent / "ray"), "start", "--block", "--disable-usage-stats",
            f"--node-ip-address={address}", f"--labels=ray.io/region={region}",
            f"--object-store-memory={_STORE_BYTES}", "--dashboard-agent-listen-port=0",
            f"--dashboard-agent-grpc-port={free_ports()}", "--include-log-monitor=false",
            *arguments,
        ]  # fmt: skip
        log = self.folder / f"{name}.log"
        return Node(name, region, address, self.spawn(command, log, address), time.time(), log)

    def _wait_for(self, node: Node) -> None:
        while not node.is_up():
            if not node.alive() or time.time() > node.started_s + _START_S:
                raise ClusterError(f"Ray did not start on this machine: {self._last_words(node)}")
            time.sleep(_POLL_S)

    def _new_address(self) -> str:
        return _LOOPBACK if self.network is None else self.network.address()

    def stop(self) -> None:
        """End all processes."""
        for node in [*self.nodes, self.head]:
            end_session(node.process.pid)
            with contextlib.suppress(subprocess.TimeoutExpired):
                node.process.wait(_STOP_S)
        self.nodes.clear()


@contextlib.contextmanager
def local_cluster(
    nodes: int,
    workers_per_node: int = 1,
    *,
    notice_s: float = 30.0,
    network: Island | None = None,
) -> Iterator[LocalCluster]:
    """A head and ``nodes`` nodes, in two regions in turn.

    Raises:
        ClusterError: Ray did not start.
    """
    # Short: the paths of Ray's sockets are in it, and may have 107 characters.
    with tempfile.TemporaryDirectory(prefix="rtgc", dir="/tmp", ignore_cleanup_errors=True) as name:
        cluster = None
        try:
            cluster = LocalCluster(Path(name), workers_per_node, notice_s, network)
            for _ in range(nodes):
                cluster.add_node()
            cluster.wait()
            yield cluster
        finally:
            if cluster is not None:
                cluster.stop()
