"""Stages that don't compute at an even pace: jitter, and stragglers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from ray_train_geo.schedule.actions import Action

__all__ = ["paces"]


def paces(
    actions: Sequence[Sequence[Action]],
    *,
    jitter: float = 0.0,
    stragglers: Mapping[int, float] | None = None,
    seed: int = 0,
) -> tuple[tuple[float, ...], ...]:
    """A ``PipelineWork.pace``: by which factor each action is slower than its stage's seconds.

    Args:
        actions: ``[stages][any]``; each stage's schedule.
        jitter: standard deviation of an action's time, in parts of its mean (log-normal, mean 1).
        stragglers: how many times as long all of a stage's actions take.
        seed: the same one gives the same paces.

    Returns:
        ``[stages][any]``.

    Raises:
        ValueError: a negative jitter, a factor that is not positive, a stage that is not there.
    """
    slow = dict(stragglers or {})
    if not 0 <= jitter < math.inf:
        raise ValueError(f"jitter is 0 or more, not {jitter}")
    for stage, factor in slow.items():
        if not 0 <= stage < len(actions) or not 0 < factor < math.inf:
            raise ValueError(f"no straggler: stage {stage} of {len(actions)}, factor {factor}")
    generator = np.random.default_rng(seed)
    sigma = math.sqrt(math.log1p(jitter**2))
    return tuple(
        tuple((slow.get(s, 1.0) * generator.lognormal(-(sigma**2) / 2, sigma, len(todo))).tolist())
        for s, todo in enumerate(actions)
    )
