"""How a step's microbatches are shared among pipelines, so that the slowest is done the earliest.

A pipeline's makespan is the largest of a few lines ``intercept + slope * microbatches`` (one for
each stage or hop that may be what it waits for), so it is convex, and equal finish times are best.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

__all__ = ["Lines", "makespan_s", "split_microbatches"]

Lines = Sequence[tuple[float, float]]
"""``(intercept_s, slope_s)`` pairs; the makespan is the largest of them."""

_ROUNDS = 50


def makespan_s(lines: Lines, microbatches: float) -> float:
    """Seconds that a pipeline takes for ``microbatches``."""
    return max(a + b * microbatches for a, b in lines)


def _active(lines: Lines, microbatches: float) -> tuple[float, float]:
    return max(lines, key=lambda line: line[0] + line[1] * microbatches)


def split_microbatches(
    total: int, lines: Sequence[Lines], most: Sequence[int] | None = None
) -> tuple[int, ...] | None:
    """Share ``total`` microbatches among pipelines, at least one each, for the smallest makespan.

    Newton's method on the common finish time, which is exact for lines, then one by one what
    rounding left over: to who would be done with one more the earliest.

    Args:
        lines: of each pipeline, with positive slopes.
        most: microbatches that each pipeline has memory for.

    Returns:
        None where they can't be shared: fewer than pipelines, or more than there is memory for.
    """
    count = len(lines)
    caps = [total] * count if most is None else [min(m, total) for m in most]
    if total < count or sum(caps) < total or min(caps) < 1:
        return None
    at = [total / count] * count
    finish_s = 0.0
    for _ in range(_ROUNDS):
        active = [_active(ls, m) for ls, m in zip(lines, at, strict=True)]
        rate = sum(1 / b for _, b in active)
        aimed = (total + sum(a / b for a, b in active)) / rate
        at = [max(0.0, min((aimed - a) / b for a, b in ls)) for ls in lines]
        if abs(aimed - finish_s) <= 1e-12 * aimed:
            break
        finish_s = aimed
    counts = [max(1, min(cap, int(m + 1e-9))) for cap, m in zip(caps, at, strict=True)]
    left = total - sum(counts)
    if left > 0:
        queue = [
            (makespan_s(lines[i], counts[i] + 1), i) for i in range(count) if counts[i] < caps[i]
        ]
        heapq.heapify(queue)
        while left:
            _, i = heapq.heappop(queue)
            counts[i] += 1
            left -= 1
            if counts[i] < caps[i]:
                heapq.heappush(queue, (makespan_s(lines[i], counts[i] + 1), i))
    elif left < 0:
        queue = [(-makespan_s(lines[i], counts[i]), i) for i in range(count) if counts[i] > 1]
        heapq.heapify(queue)
        while left:
            _, i = heapq.heappop(queue)
            counts[i] -= 1
            left += 1
            if counts[i] > 1:
                heapq.heappush(queue, (-makespan_s(lines[i], counts[i]), i))
    return tuple(counts)
