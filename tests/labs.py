"""Labs for tests: skipped where none can be made, an error where CI says that it must."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from ray_train_geo.cluster.topology import Device, Link, Topology
from ray_train_geo.lab.lab import Lab
from ray_train_geo.lab.probe import why_not

MBIT = 1e6 / 8

_reason = functools.cache(why_not)


def needs_lab() -> None:
    """Skip the test, with the reason, where no lab can be made; GEO_REQUIRE=1 makes that fail."""
    reason = _reason()
    if reason is not None and os.environ.get("GEO_REQUIRE") == "1":
        pytest.fail(f"GEO_REQUIRE=1, but: {reason}")
    if reason is not None:
        # .ci/run sets GEO_REQUIRE wherever the probe can make a lab, so nothing is skipped unseen.
        pytest.skip(
            f"emulated hosts take root and /dev/net/tun, which this machine lacks: {reason}"
        )


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
