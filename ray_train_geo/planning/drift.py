"""Has a figure changed for good?  Not for a dip, and not for noise.

::

    usual: the first minute or less            recent: must stand out for so long
    ·  · ·   · ·  ·   ·  · · ·    ·  ·         *  * *  *  * **
      ·    ·        ·       ·   ·       - - - - - - - - - - - - -   four in five of the usual
                                                                    samples, and a factor from
                                                                    their median
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Iterable

__all__ = ["Drift"]

_AGREE = 0.8
_FEWEST = 8
_USUAL = 60
_FIFTH = 5


class Drift:
    """Watches one figure; a change is a factor for a time, in four samples of five.

    Args:
        factor: from the median of what is usual, in either direction.
        persist_s: for so long it must last.
        samples: at least so many must show it.
        skipped: before all others: what comes first is cold.
        usual: where it is known already.
    """

    def __init__(
        self,
        factor: float,
        persist_s: float,
        samples: int = 6,
        skipped: int = 1,
        usual: Iterable[float] = (),
    ) -> None:
        self._factor, self._persist_s = factor, persist_s
        self._samples, self._skipped = samples, skipped
        self._usual = list(usual)
        self._recent: deque[tuple[float, float]] = deque()

    @property
    def usual(self) -> tuple[float, ...]:
        """Samples of what is usual."""
        return tuple(self._usual)

    def add(self, now_s: float, value: float) -> None:
        """Another sample, a figure above 0."""
        if self._skipped:
            self._skipped -= 1
            return
        recent = self._recent
        recent.append((now_s, value))
        # One that is older than the time that counts is kept: it proves its length.
        while len(recent) > self._samples and recent[1][0] <= now_s - self._persist_s:
            _, over = recent.popleft()
            if len(self._usual) < _USUAL:
                self._usual.append(over)

    @property
    def ratio(self) -> float | None:
        """Of the recent figure to the usual one, if it is another for good."""
        values = [value for _, value in self._recent]
        if len(self._usual) < _FEWEST or len(values) < self._samples:
            return None
        if self._recent[-1][0] - self._recent[0][0] < self._persist_s:
            return None
        usual, in_order = statistics.median(self._usual), sorted(self._usual)
        fifth = len(in_order) // _FIFTH
        high = max(self._factor * usual, in_order[-1 - fifth])
        low = min(usual / self._factor, in_order[fifth])
        above = sum(value >= high for value in values)
        below = sum(value <= low for value in values)
        if max(above, below) < _AGREE * len(values):
            return None
        return statistics.median(values) / usual

    def settle(self) -> None:
        """What is recent is usual from now on."""
        self._usual = [value for _, value in self._recent]
        self._recent.clear()
