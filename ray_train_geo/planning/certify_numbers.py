"""The least bound over all numbers of pipelines: best first, and only as finely as it matters.

How long gradients take depends on how many pipelines there are, so each number has a bound of its
own.  First they are looked at in ranges; then the range with the least bound is halved, until the
least is that of one number::

    1..2   3..12   13..15   16..20   21..27        16..20 is the least: halve it
      .       .        .    16-18 19-20  .         16-18 is: halve it ...
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from heapq import heapify, heappush, heapreplace

from ray_train_geo.spec import GradientSyncName

__all__ = ["Numbers", "OutOfTimeError", "least_over_all"]

_CLOSE = 1.02
"""Numbers whose ratio is no more are not told apart."""
_FARTHER = 1.02
"""How much farther than the next best a range is looked at, at least."""


class OutOfTimeError(Exception):
    """Not all plans could be looked at."""


@dataclass(frozen=True, slots=True, order=True)
class Numbers:
    """Plans of one mode of gradient sync, and of so many pipelines (fewest, most).

    Args:
        at_least_s: none of them steps in less.
        exact: that is all that this bound can say; else it may be larger.
    """

    at_least_s: float
    pipelines: tuple[int, int]
    mode: GradientSyncName
    exact: bool = field(default=False, compare=False)

    def halves(self) -> tuple[Numbers, ...]:
        """Both halves, of which nothing more is known; none where it is not worth it."""
        fewest, most = self.pipelines
        if most <= fewest * _CLOSE:
            return ()
        middle = (fewest + most) // 2
        ranges = (fewest, middle), (middle + 1, most)
        return tuple(replace(self, pipelines=r, exact=False) for r in ranges)


def least_over_all(
    ranges: Sequence[Numbers], least_s: Callable[[Numbers, float], float], enough_s: float
) -> tuple[float, bool]:
    """No plan steps in less, and whether that is all that the bound can say; in seconds.

    Args:
        ranges: of all plans, at least one; the most promising first.
        least_s: the bound of a range, up to a limit; raises OutOfTimeError.
        enough_s: a larger bound is of no use.
    """
    left = list(ranges)

    def looked_at(numbers: Numbers, limit_s: float) -> Numbers:
        found_s = least_s(numbers, limit_s)
        return replace(numbers, at_least_s=found_s, exact=found_s < limit_s)

    try:
        limit_s = enough_s
        for i, numbers in enumerate(ranges):
            left[i] = looked_at(numbers, limit_s)
            limit_s = min(limit_s, left[i].at_least_s)
        heapify(left)
        while (first := left[0]).at_least_s < enough_s:
            if not first.exact:
                next_s = min((n.at_least_s for n in left[1:3]), default=enough_s)
                limit_s = min(enough_s, max(next_s, first.at_least_s * _FARTHER))
                heapreplace(left, looked_at(first, limit_s))
                continue
            halves = first.halves()
            if not halves:
                break
            heapreplace(left, halves[0])
            heappush(left, halves[1])
    except OutOfTimeError:
        return min(n.at_least_s for n in left), False
    return left[0].at_least_s, True
