"""Ranges that counts are looked at in: small ones one by one, larger ones together."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ray_train_geo.planning.link_table import Ints

__all__ = ["microbatch_ranges", "pipeline_ranges"]

_EXACT_COUNTS = 64
_COUNT_RATIO = 1.01
"""Microbatch counts beyond the exact ones are looked at in ranges of this ratio."""
_EXACT_PIPELINES = 12
_PIPELINES_RATIO = 1.3


def microbatch_ranges(total: int, given: Sequence[int] | None) -> tuple[Ints, Ints]:
    """Ranges (fewest, most) that a pipeline's microbatches may be in.

    Args:
        given: what pipelines have, if the job says so.
    """
    if given is not None:
        exact = np.unique(given)
        return exact, exact
    ends = _growing(1, total, _EXACT_COUNTS, _COUNT_RATIO)
    return np.array([a for a, _ in ends]), np.array([b for _, b in ends])


def pipeline_ranges(fewest: int, most: int) -> list[tuple[int, int]]:
    """Ranges (fewest, most) of numbers of pipelines."""
    return _growing(fewest, most, _EXACT_PIPELINES, _PIPELINES_RATIO)


def _growing(first: int, last: int, exact: int, ratio: float) -> list[tuple[int, int]]:
    """Ranges that cover first..last: single numbers up to ``exact``, then longer and longer."""
    ranges = []
    while first <= last:
        end = first if first < exact else min(last, max(first, int(first * ratio)))
        ranges.append((first, end))
        first = end + 1
    return ranges
