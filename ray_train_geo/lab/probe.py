"""Whether emulated hosts can be made on this machine, found out by making two.

``python -m ray_train_geo.lab.probe`` says so with its exit code.
"""

from __future__ import annotations

import sys

from ray_train_geo.cluster.topology import Device, Topology
from ray_train_geo.errors import GeoError
from ray_train_geo.lab.lab import Lab
from ray_train_geo.lab.measure import round_trip_s

__all__ = ["why_not"]


def why_not() -> str | None:
    """Why this process can't make emulated hosts, in one line; None if it can."""
    try:
        with Lab(Topology((Device("a/0", "a"), Device("b/0", "b")))) as lab:
            round_trip_s(lab, "a", "b", samples=1)
    except GeoError as e:
        return str(e)
    return None


if __name__ == "__main__":
    sys.exit(why_not())
