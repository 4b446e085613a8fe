"""Ray on the hosts of a lab: a head on the first one, with labels for region, zone and market.

Ray is started by its own command, so this module does not import it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ray_train_geo.errors import ClusterError, SpecError
from ray_train_geo.lab.host import INTERFACE
from ray_train_geo.lab.lab import Lab
from ray_train_geo.lab.network import Host

__all__ = ["RayOnLab"]

_PORT = 6379
_OBJECT_STORE_BYTES = 80_000_000
_MEMORY_SHARE = 0.7
"""Of this machine's memory, what all hosts together tell Ray that they have."""
_START_S = 120.0
_ATTEMPTS = 3
_TAIL_BYTES = 2000


class RayOnLab:
    """A Ray cluster whose nodes are the hosts of a lab.

    Args:
        lab: where.
        cpus: of each host, as far as Ray knows.
        settings: environment variables of all of Ray's processes, such as
            ``RAY_health_check_timeout_ms``.
    """

    def __init__(self, lab: Lab, cpus: int = 1, settings: Mapping[str, str] | None = None) -> None:
        self.lab = lab
        self.cpus = cpus
        self.address = f"{lab.hosts[0].address}:{_PORT}"
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        own = {k: v for k, v in os.environ.items() if k.startswith("RAY_TRAIN_GEO")}
        self.environment = {
            **inherited,
            **own,
            # Else a token that an earlier Ray of this user left would be asked for.
            "RAY_AUTH_MODE": "disabled",
            "RAY_ADDRESS": self.address,
            "RAY_USAGE_STATS_ENABLED": "0",
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
            "PATH": f"{Path(sys.executable).parent}:{os.environ.get('PATH', os.defpath)}",
            "GLOO_SOCKET_IFNAME": INTERFACE,
            **(settings or {}),
        }

    def start(self) -> float:
        """Start the head, then all others at once; returns how long that took, in seconds.

        Raises:
            ClusterError: a node does not start.
        """
        began_s = time.monotonic()
        self.join(self.lab.hosts[:1])
        self.join(self.lab.hosts[1:])
        return time.monotonic() - began_s

    def join(self, hosts: Sequence[Host]) -> None:
        """Start Ray on hosts where it does not run, such as one that was booted again.

        Raises:
            ClusterError: a node does not start.
        """
        # No more at once than processors: Ray gives up on a node that takes 30 s to start.
        with ThreadPoolExecutor(max(2, os.cpu_count() or 1)) as starting:
            for _ in starting.map(self._join, hosts):
                pass

    def _join(self, host: Host) -> None:
        # On a busy machine a raylet ends itself when the head takes seconds to answer it.
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                done = self.run(
                    host.name,
                    self._start_command(host),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    timeout=_START_S,
                )
            except subprocess.TimeoutExpired:
                raise ClusterError(f"Ray did not start on {host.name} in {_START_S:g} s") from None
            if not done.returncode:
                return
            said = done.stdout.decode(errors="replace").strip()[-_TAIL_BYTES:]
            if attempt == _ATTEMPTS:
                raise ClusterError(f"Ray does not start on {host.name}: {said}")

    def run(
        self, host: str | int, command: Sequence[str], **options: Any
    ) -> subprocess.CompletedProcess[Any]:
        """As :meth:`Lab.run`, where Ray finds its cluster."""
        return self.lab.run(host, command, **{"env": self.environment, **options})

    def popen(
        self, host: str | int, command: Sequence[str], **options: Any
    ) -> subprocess.Popen[Any]:
        """As :meth:`Lab.popen`, where Ray finds its cluster."""
        return self.lab.popen(host, command, **{"env": self.environment, **options})

    def train_command(self, job: Path, overrides: Sequence[str] = ()) -> list[str]:
        """What trains a job when it runs on the first host.

        Raises:
            SpecError: there is no such file.
        """
        if not job.is_file():
            raise SpecError(f"there is no job spec {job}")
        return [
            *(sys.executable, "-m", "ray_train_geo", "train", str(job.absolute())),
            *("--address", self.address),
            *(part for text in overrides for part in ("--set", text)),
        ]

    def _start_command(self, host: Host) -> list[str]:
        labels = {
            "ray.io/region": host.region,
            "ray.io/zone": host.zone,
            "ray.io/market-type": host.market_type,
        }
        head = host == self.lab.hosts[0]
        temp = self.lab.folder / host.address
        temp.mkdir(exist_ok=True)
        return [
            str(Path(sys.executable).parent / "ray"),
            *("start", "--disable-usage-stats", "--include-log-monitor=false"),
            *(f"--node-ip-address={host.address}", f"--num-cpus={self.cpus}", "--num-gpus=0"),
            *(f"--object-store-memory={_OBJECT_STORE_BYTES}", f"--temp-dir={temp}"),
            f"--memory={int(_MEMORY_SHARE * _machine_bytes() / len(self.lab.hosts))}",
            f"--labels={','.join(f'{k}={v}' for k, v in labels.items() if v)}",
            *(
                ("--head", f"--port={_PORT}", "--include-dashboard=false", "--no-monitor")
                if head
                else (f"--address={self.address}",)
            ),
        ]


def _machine_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
