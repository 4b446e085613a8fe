"""Max-min fair rates: how flows divide what they share.

No flow can get more without taking from one that has no more than it (Bertsekas and Gallager,
*Data Networks*, section 6.5.2).  It is what TCP flows of equal round trips tend to.
"""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heapify, heappop, heapreplace

__all__ = ["max_min_rates"]


def max_min_rates(
    counts: Sequence[int],
    limits: Sequence[float],
    uses: Sequence[Sequence[int]],
    capacities: Sequence[float],
) -> tuple[list[float], list[int | None]]:
    """The max-min fair rate of a flow of each class, by progressive filling.

    All rates grow together.  A class stops at its own limit, or when something that it uses is
    full::

        two of class 0, limit 9, over a        a: 10 = 4 + 4 + 2
        one of class 1, limit 2, over a and b  b:  6 = 2 + 4 (of 4)
        one of class 2, limit 4, over b        rates: 4, 2, 4

    Args:
        counts: ``[classes]``; flows of each class, at least 1.
        limits: ``[classes]``; most that one flow of the class can carry, in bytes per second.
        uses: ``[classes][any]``; numbers of the resources that the class's flows go through.
        capacities: ``[resources]``; bytes per second.

    Returns:
        ``[classes]``, twice: bytes per second, and the full resource that stops the class at that
        rate, None where it is its limit.
    """
    users: list[list[int]] = [[] for _ in capacities]
    for c, used in enumerate(uses):
        for r in used:
            users[r].append(c)
    free = list(capacities)
    growing = [sum(counts[c] for c in sharers) for sharers in users]
    rates = list(limits)
    stopped_by: list[int | None] = [None] * len(counts)
    stopped = [False] * len(counts)

    def stop(c: int, rate: float) -> None:
        rates[c] = rate
        stopped[c] = True
        for r in uses[c]:
            free[r] -= counts[c] * rate
            growing[r] -= counts[c]

    # An equal share of what is free only grows while others stop below it, so an outdated one
    # in the heap is too low, never too high.
    shares = [(free[r] / growing[r], r) for r in range(len(capacities)) if growing[r]]
    heapify(shares)
    rising = sorted(range(len(counts)), key=limits.__getitem__)
    at = 0
    while shares:
        share, r = shares[0]
        while at < len(rising) and limits[rising[at]] <= share:
            if not stopped[rising[at]]:
                stop(rising[at], limits[rising[at]])
            at += 1
        if not growing[r]:
            heappop(shares)
        elif free[r] / growing[r] > share:
            heapreplace(shares, (free[r] / growing[r], r))
        else:
            for c in users[r]:
                if not stopped[c]:
                    stop(c, share)
                    stopped_by[c] = r
            heappop(shares)
    return rates, stopped_by
