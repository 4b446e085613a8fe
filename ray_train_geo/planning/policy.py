"""When a better plan is worth the move.

A move pauses training for ``cost`` seconds: layers stream over real links (predicted), and groups
are built anew (known from earlier pauses).  What it gains lasts until something else changes::

    gain   (1 - better / now) * T       T: expected time until the next change
    cost   moving + pause               seconds in which nothing is computed

A move must pay several times over, as both are predictions; and because even then they may be
wrong, moves must be earned: each leaves a debt that is paid off by a small share of the time that
passes, and the next one waits while that debt is more than twice its own cost.  Whatever is
predicted and measured, moves so take

    sum of costs <= share * time + 3 * the largest cost

Going back to a plan that was left takes twice the gain, each time anew: no two plans alternate.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter, deque
from collections.abc import Hashable, Iterable
from dataclasses import dataclass

from ray_train_geo.cluster.topology import Device

__all__ = ["ChangeHistory", "MovePolicy", "Offer", "Verdict", "time_between_changes_s"]

_SPOT_NODE_S = 4 * 3600.0
"""From one preemption of a spot node to its next: 1.6 h on the trace ``aws-p3``, 9.9 h on
``gcp-a100``; their geometric mean."""

_ON_DEMAND_NODE_S = 6300 * 3600.0
"""419 unexpected interruptions of 2,048 nodes in 54 days (Llama Team, "The Llama 3 Herd of Models",
2024, section 3.3.4)."""

_MEMORY_S = 1800.0
"""Changes are forgotten at this time constant: fleets have calm and stormy hours."""

_REMEMBERED = 256

_LEAST_GAIN = 0.03
"""Smaller differences are within what predictions miss by."""

_MARGIN = 2.0
"""By how much a gain must exceed its cost."""

_SHARE = 0.05
"""Of all time, what voluntary moves may take in the long run."""

_DEBTS = 2.0
_FIRST_PAUSE_S = 1.0
_PAUSES = 5


def time_between_changes_s(devices: Iterable[Device]) -> float:
    """What to expect of a fleet of which nothing is known but its nodes' markets, in seconds."""
    markets = {d.node: d.market_type for d in devices}
    means = (_SPOT_NODE_S if m == "spot" else _ON_DEMAND_NODE_S for m in markets.values())
    per_s = sum(1 / mean for mean in means)
    return 1 / per_s if per_s else math.inf


class ChangeHistory:
    """How often devices come and go; times are in seconds of any clock that does not jump.

    May be asked from any thread.
    """

    def __init__(self) -> None:
        self._changes: tuple[float, ...] = ()

    def happened(self, now_s: float) -> None:
        """Devices came or went."""
        self._changes = (*self._changes, now_s)[-_REMEMBERED:]

    def expected_s(self, devices: Iterable[Device], now_s: float) -> float:
        """Time until the next change: at the rate of the markets, and of the recent past."""
        recent = sum(math.exp((then_s - now_s) / _MEMORY_S) for then_s in self._changes)
        return 1 / (1 / time_between_changes_s(devices) + recent / _MEMORY_S)


@dataclass(frozen=True, slots=True)
class Offer:
    """A plan that could replace the one in force.

    Args:
        plan: what tells it from others.
        step_s: predicted step of the plan in force, on the topology as it is now.
        better_step_s: predicted step of the offered one.
        moving_s: for its layers to be where they must be.
    """

    plan: Hashable
    step_s: float
    better_step_s: float
    moving_s: float

    @property
    def gain(self) -> float:
        """The part of a step's time that is saved."""
        return 1 - self.better_step_s / self.step_s


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether to move, and the figures that say so.

    Args:
        expected_s: until the next change.
        gain_s: training time saved until then.
        cost_s: time in which nothing is computed.
    """

    adopt: bool
    reason: str
    gain: float
    expected_s: float
    gain_s: float
    cost_s: float


class MovePolicy:
    """Weighs offers; deterministic in what it is told, the clock included."""

    def __init__(self, now_s: float, history: ChangeHistory | None = None) -> None:
        self.history = history or ChangeHistory()
        self._pauses: deque[float] = deque(maxlen=_PAUSES)
        self._debt_s = 0.0
        self._paid_s = now_s
        self._left: Counter[Hashable] = Counter()

    def paused(self, pause_s: float) -> None:
        """A new generation was built: what that took, without moving layers."""
        self._pauses.append(pause_s)

    @property
    def pause_s(self) -> float:
        """What building a generation takes: the median of the last ones."""
        return statistics.median(self._pauses) if self._pauses else _FIRST_PAUSE_S

    def judge(self, offer: Offer, devices: Iterable[Device], now_s: float) -> Verdict:
        """Whether ``offer`` is to replace the plan in force on ``devices``."""
        self._pay(now_s)
        expected_s = self.history.expected_s(devices, now_s)
        gain_s, cost_s = offer.gain * expected_s, offer.moving_s + self.pause_s
        again = 2.0 ** self._left[offer.plan]
        if offer.gain < _LEAST_GAIN * again:
            reason = f"the gain is below {_LEAST_GAIN * again:.0%}"
        elif gain_s < _MARGIN * again * cost_s:
            reason = f"it would not pay {_MARGIN * again:g} times over before the next change"
        elif self._debt_s > _DEBTS * cost_s:
            reason = "earlier moves have yet to pay off"
        else:
            return Verdict(True, "it pays", offer.gain, expected_s, gain_s, cost_s)
        return Verdict(False, reason, offer.gain, expected_s, gain_s, cost_s)

    def moved(self, left: Hashable, cost_s: float, now_s: float) -> None:
        """The plan ``left`` was given up for a better one."""
        self._pay(now_s)
        self._debt_s += cost_s
        self._left[left] += 1

    def _pay(self, now_s: float) -> None:
        self._debt_s = max(0.0, self._debt_s - _SHARE * (now_s - self._paid_s))
        self._paid_s = now_s
