"""Links as slow as a topology file says, while it says so: edit it, and they change."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from pathlib import Path

from ray_train_geo.cluster.topology import Device, Topology
from ray_train_geo.cluster.topology_file import load_topology
from ray_train_geo.errors import GeoError
from ray_train_geo.training.emulation import Emulation

__all__ = ["EmulatedLinks"]

_POLL_S = 0.25


class EmulatedLinks:
    """An emulation of links that follows a file, until it is closed.

    What can't be read or used (a file half written) changes nothing.

    Args:
        devices: of the plan.

    Raises:
        GeoError: the file can't be read, or used, to begin with.
    """

    def __init__(self, path: Path, devices: Sequence[Device]) -> None:
        self._path = path
        self._version = _version(path)
        self.emulation = Emulation(_topology(path, devices), compute=False)
        self._devices = devices
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="emulated-links", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread."""
        self._closed.set()
        self._thread.join()

    def _follow(self) -> None:
        while not self._closed.wait(_POLL_S):
            version = _version(self._path)
            if version == self._version:
                continue
            self._version = version
            try:
                self.emulation.change(_topology(self._path, self._devices))
            except GeoError:
                continue


def _topology(path: Path, devices: Sequence[Device]) -> Topology:
    return load_topology(path).with_devices(devices)


def _version(path: Path) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size
