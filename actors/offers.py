"""What those who look around offer a run: one change at a time, made for what is there by then."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from ray_train_geo.actors.crew import Crew, Spot
from ray_train_geo.cluster.topology import Topology
from ray_train_geo.planning.plan import Plan

__all__ = ["Cause", "Change", "Offers", "Situation"]

_RETRY_S = 0.05

Cause = Literal["start", "failure", "join", "drain", "better plan", "straggler", "link"]
"""Why a plan is in force."""


@dataclass(frozen=True, slots=True)
class Situation:
    """What a run is at.

    Args:
        generation: the number of the plan in force.
        cause: why it is in force.
        pause_s: what that took, without moving layers; None if nothing was interrupted.
        topology: of the crew's devices, as it was measured.
        plan: in force, or the last one if the run waits for devices.
        spots: the crew's nodes.
        crew: of which others may only ask.
    """

    generation: int
    cause: Cause
    pause_s: float | None
    topology: Topology
    plan: Plan
    spots: Mapping[str, Spot]
    crew: Crew
    waiting: bool


@dataclass(frozen=True, slots=True)
class Change:
    """What is to change at the next boundary of a step.

    Args:
        cause: in one word, for the record; ``reason`` is a sentence.
        base: the plan that was in force.
        plan: the next one; None where the run has yet to make it.
        recruits: workers that are ready; not yet of the run's crew.
        topology: with their devices and links, as measured.
        leaving: devices whose node is being drained.
        figures: what spoke for it.
    """

    cause: Cause
    reason: str
    base: Plan
    plan: Plan | None
    recruits: Crew | None = None
    topology: Topology | None = None
    leaving: frozenset[str] = frozenset()
    figures: Mapping[str, float] = field(default_factory=dict)


class Offers:
    """Safe from several threads.

    Args:
        situation: None while there is nothing to change.
        offer: takes a change, and no other before :meth:`resume`.
    """

    def __init__(
        self, situation: Callable[[], Situation | None], offer: Callable[[Change], None]
    ) -> None:
        self.situation = situation
        self.closed = threading.Event()
        self._offer = offer
        self._offering = threading.Lock()
        self._resumed = threading.Event()
        self._resumed.set()

    @property
    def pending(self) -> bool:
        """Whether a change has been offered and not yet been dealt with."""
        return not self._resumed.is_set()

    def propose(self, make: Callable[[Situation], Change | None]) -> bool:
        """Offer what ``make`` makes of the situation, once there is one and no change is pending.

        Returns:
            Whether there was a change to offer.
        """
        while not self.closed.is_set():
            self._resumed.wait()
            with self._offering:
                now = self.situation()
                if now is not None and self._resumed.is_set() and not self.closed.is_set():
                    change = make(now)
                    if change is None:
                        return False
                    self._resumed.clear()
                    self._offer(change)
                    return True
            self.closed.wait(_RETRY_S)
        return False

    def resume(self) -> None:
        """The change that was offered has been dealt with."""
        self._resumed.set()

    def close(self) -> None:
        """Nobody is listening any more."""
        self.closed.set()
        self._resumed.set()
