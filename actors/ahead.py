"""Links of the next generation, made while the one before trains on.

A change that is planned (a node comes, or is drained, or a better plan was found) need not wait
for the round trips of its groups: what is left between the two generations is state.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util import get_node_ip_address
from torch.distributed import TCPStore

from ray_train_geo.planning.plan import Plan

__all__ = ["Ahead", "Rendezvous"]

_PATIENCE_S = 20.0
"""Links that take longer are made between the generations, with deadlines of their own."""


class Rendezvous:
    """Where the workers of a generation find each other.  Its end releases who still waits."""

    def __init__(self) -> None:
        self.host = get_node_ip_address()
        self._store = TCPStore(self.host, 0, is_master=True, wait_for_workers=False)
        self.port = int(self._store.port)


class Ahead:
    """What workers were told to make, and how far they are.

    Args:
        generation: the links' own; if they are not used, nobody uses that number.
        calls: to the workers, with their devices.
    """

    def __init__(
        self, generation: int, plan: Plan, rendezvous: Rendezvous, calls: Mapping[Any, str]
    ) -> None:
        self.generation = generation
        self.plan = plan
        self.rendezvous = rendezvous
        self.made = False
        self._calls = dict(calls)
        self._until_s = time.monotonic() + _PATIENCE_S

    @property
    def devices(self) -> list[str]:
        return list(self._calls.values())

    def pending(self) -> bool:
        """Whether it pays to wait; afterwards they are ``made``, or will never be."""
        calls = list(self._calls)
        done, waiting = ray.wait(calls, num_returns=len(calls), timeout=0)
        try:
            ray.get(done)
        except RayError:
            return False
        self.made = not waiting
        return not self.made and time.monotonic() < self._until_s
