"""Labs for tests: skipped where the kernel refuses them, an error where CI says it must not."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from ray_train_geo.cluster.topology import Device, Link, Topology
from ray_train_geo.lab.lab import Lab

MBIT = 1e6 / 8


@functools.cache
def _refusal() -> str | None:
    """Why the kernel does not let this machine have emulated hosts, if it does not."""
    probe = [sys.executable, "-m", "ray_train_geo.lab.probe"]
    done = subprocess.run(probe, capture_output=True, text=True, timeout=60)
    if done.returncode and not done.stderr.startswith("no lab can be made here"):
        pytest.fail(f"the probe itself failed: {done.stderr}")
    return done.stderr.strip() if done.returncode else None


def needs_lab() -> None:
    """Skip the test where the kernel refuses emulated hosts; GEO_REQUIRE=1 makes that fail.

    Only the kernel is asked: where it agrees, a lab that can't be made is a failure, so that no
    fault of ours is ever skipped.
    """
    refusal = _refusal()
    if refusal is None:
        return
    if os.environ.get("GEO_REQUIRE") == "1":
        pytest.fail(f"GEO_REQUIRE=1, but: {refusal}")
    # An unprivileged container can't have namespaces, whatever we do; its user still has to see
    # all other tests pass.  The reason is the kernel's own word.
    pytest.skip(refusal)


def hosts(
    *names: str, latency_s: float = 0.0, mbit: float = 1000.0, **more: Mapping[Any, Any]
) -> Topology:
    """Hosts that are each a region of their own, in capitals, with equal links between them."""
    devices = tuple(Device(f"{n}/0", n, n.upper()) for n in names)
    return Topology(devices, default_link=Link(latency_s, mbit * MBIT), **more)


def lab(topology: Topology) -> Lab:
    needs_lab()
    return Lab(topology)


def until(condition: Callable[[], Any], seconds: float = 10.0) -> Any:
    """What ``condition`` returns once it is true."""
    ends = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < ends, f"it did not happen within {seconds:g} s"
        time.sleep(0.02)
    return found
