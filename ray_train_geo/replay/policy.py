"""How a policy is driven: it is told of changes, and may ask to be woken."""

from __future__ import annotations

import math
from typing import Protocol

from ray_train_geo.replay.fleet import Change
from ray_train_geo.replay.ledger import Ledger

__all__ = ["Policy", "play"]


class Policy(Protocol):
    """Reacts to what happens to a fleet, and writes into its ledger what that means.

    Args:
        wake_s: when it wants to be woken; infinite is never.
        replans: plans that came into force, the first included.
    """

    ledger: Ledger
    wake_s: float
    replans: int

    def change(self, change: Change) -> None:
        """Nodes come, go, or are about to go, now."""

    def wake(self, now_s: float) -> None:
        """The moment it asked for has come; it must ask for a later one, or none."""


def play(policy: Policy) -> Ledger:
    """Everything that happens, in order; what a policy asked for comes before a change."""
    fleet = policy.ledger.fleet
    for change in fleet.changes:
        _wake(policy, change.time_s)
        policy.change(change)
    _wake(policy, math.nextafter(fleet.end_s, 0.0))
    policy.ledger.end(fleet.end_s)
    return policy.ledger


def _wake(policy: Policy, until_s: float) -> None:
    while policy.wake_s <= until_s:
        policy.wake(policy.wake_s)
