"""Time that a search may take: the planner's only clock, and only where there is a limit."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

__all__ = ["Budget"]


class Budget:
    """Starts when it is made.

    Args:
        seconds: in all; None is as long as it takes.
        clock: in seconds.
    """

    def __init__(
        self, seconds: float | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._seconds = math.inf if seconds is None else seconds
        self._clock = clock
        self._began = clock() if seconds is not None else 0.0

    def spent(self, share: float = 1.0) -> bool:
        """Whether more than ``share`` of the time is gone."""
        if math.isinf(self._seconds):
            return False
        return self._clock() - self._began >= share * self._seconds
