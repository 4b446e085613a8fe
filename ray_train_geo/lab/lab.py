"""Emulated hosts on one machine, with the links of a topology between them."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from ray_train_geo.cluster.scenarios import scenario
from ray_train_geo.cluster.topology import Topology
from ray_train_geo.cluster.topology_file import dump_topology
from ray_train_geo.errors import ClusterError, SpecError
from ray_train_geo.lab.control import Control
from ray_train_geo.lab.emulate import network, some_nodes
from ray_train_geo.lab.enter import enter_command
from ray_train_geo.lab.host import INTERFACE
from ray_train_geo.lab.network import Host
from ray_train_geo.lab.probe import no_lab
from ray_train_geo.lab.switch import CONTROL

__all__ = ["Lab"]

_END_S = 20.0


class Lab(Control):
    """Hosts in network namespaces, joined by a switch that delays and slows down as told.

    ::

        with Lab("worldwide", hosts=8, scale=0.01) as lab:
            lab.run("tokyo-0", ["python", "worker.py"])
            lab.cut("Tokyo", "London")

    The hosts share this machine's files and processors; network, processes and host name are
    their own.  All of it ends with this process, however that ends.

    Args:
        topology: hosts are nodes of it; or the name of a scenario.
        hosts: how many, spread evenly over the regions.  None: all nodes.
        scale: what all bandwidths are multiplied by.

    Raises:
        SpecError: no such scenario, or too many hosts.
        ClusterError: hosts can't be made here.
    """

    hosts: tuple[Host, ...]
    topology: Topology
    """What is emulated: the chosen nodes with one device each, and scaled links."""
    real_time: bool
    """Whether the switch comes first; otherwise round trips are longer on a loaded machine."""
    folder: Path
    """Where the lab's files are, Ray's too; removed at its end."""
    control_path: Path
    """For a :class:`Control` elsewhere."""
    topology_path: Path
    """:attr:`topology` as a file."""

    def __init__(
        self, topology: Topology | str, hosts: int | None = None, scale: float = 1.0
    ) -> None:
        found = scenario(topology) if isinstance(topology, str) else topology
        self.topology = some_nodes(found, hosts, scale)
        emulated = network(self.topology)
        self.hosts = emulated.hosts
        if sys.platform != "linux":
            raise ClusterError("emulated hosts are Linux namespaces: this is no Linux")
        # Not in TMPDIR: Ray's sockets go below, and a socket's path is short.
        self.folder = Path(tempfile.mkdtemp(prefix="lab", dir="/tmp"))
        self.control_path = self.folder / CONTROL
        self.topology_path = self.folder / "topology.yaml"
        dump_topology(self.topology, self.topology_path)
        self._switch = subprocess.Popen(
            [sys.executable, "-m", "ray_train_geo.lab.switch"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=False,
        )
        try:
            given = {"network": emulated.to_json(), "folder": str(self.folder)}
            self.real_time = self._start(json.dumps(given).encode())
            super().__init__(self.control_path)
        except BaseException:
            self._end()
            raise

    def host(self, name: str | int) -> Host:
        """The host of that name or number.

        Raises:
            SpecError: there is none.
        """
        if isinstance(name, int) and 0 <= name < len(self.hosts):
            return self.hosts[name]
        for host in self.hosts:
            if host.name == name:
                return host
        raise SpecError(f"no host {name!r}: there are {', '.join(h.name for h in self.hosts)}")

    def run(
        self, host: str | int, command: Sequence[str], **options: Any
    ) -> subprocess.CompletedProcess[Any]:
        """``subprocess.run`` on a host.

        Raises:
            SpecError: no such host.
            ClusterError: it is dead.
            subprocess.SubprocessError: as ``subprocess.run``.
        """
        return subprocess.run(self._inside(host, command), **self._surroundings(host, options))

    def popen(
        self, host: str | int, command: Sequence[str], **options: Any
    ) -> subprocess.Popen[Any]:
        """``subprocess.Popen`` on a host; ends, signals and exit codes are as those of any other.

        Raises:
            SpecError, ClusterError: as :meth:`run`.
        """
        return subprocess.Popen(self._inside(host, command), **self._surroundings(host, options))

    def close(self) -> None:
        """Kill the hosts with all that runs on them; nothing is left."""
        super().close()
        self._end()

    def __enter__(self) -> Lab:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _start(self, given: bytes) -> bool:
        stdin, stdout = self._switch.stdin, self._switch.stdout
        assert stdin is not None
        assert stdout is not None
        with contextlib.suppress(BrokenPipeError):
            stdin.write(len(given).to_bytes(8, "big") + given)
            stdin.flush()
        line = stdout.readline()
        answer = json.loads(line) if line else {"error": "its switch died; see above"}
        if "error" in answer:
            raise ClusterError(no_lab(answer["error"]))
        return bool(answer["real_time"])

    def _end(self) -> None:
        # The switch ends when its standard input does.
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._switch.communicate(timeout=_END_S)
        self._switch.kill()
        self._switch.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _inside(self, host: str | int, command: Sequence[str]) -> list[str]:
        name = self.host(host).name
        pid = self.pids()[name]
        if pid is None:
            raise ClusterError(f"host {name} is dead; boot it first")
        return enter_command(pid, command)

    def _surroundings(self, host: str | int, options: Mapping[str, Any]) -> dict[str, Any]:
        environment = {
            **(options.get("env") or os.environ),
            "GEO_LAB": str(self.control_path),
            "GLOO_SOCKET_IFNAME": INTERFACE,
        }
        return {**options, "env": environment}
