"""Zero-bubble: 1F1B whose weight gradients wait until nothing else is to be done (Qi et al., 2024).

A backward is two actions: B computes the gradient that the stage above waits for, W those of the
stage's own weights, which nobody waits for until the step ends.  Four stages, six microbatches,
digits F, small letters B, capitals W, one slot each; warmup 3, 2, 1, 0 and W put off by 0, 1, 2, 3
microbatches::

    0123...aA4bB5cCdDeEfF
    .012..a3bA4cB5dCeDfEF
    ..01.a2b3cA4dB5eCfDEF
    ...0a1b2c3dA4eB5fCDEF

What a stage puts off delays no B at the start, where the stages above wait for their first one,
and fills the end, where they wait for the last.  Stage ``s`` holds at most
``warmup[s] + deferred[s] + 1`` microbatches from their F to their W: here four on each stage, as
many as 1F1B's first stage holds (the paper's ZB-H1); with more warmup the first wait is filled,
too (ZB-H2), and on slow hops both waits are longer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from ray_train_geo.schedule.actions import Action
from ray_train_geo.schedule.one_f_one_b import one_f_one_b

__all__ = ["deferred_weights", "zero_bubble"]


def zero_bubble(
    warmup: Sequence[int], deferred: Sequence[int], microbatches: int
) -> list[list[Action]]:
    """The actions of each stage: 1F1B's, and after each B the W of ``deferred[s]`` Bs before.

    Args:
        warmup: ``[stages]``; as :func:`one_f_one_b`'s.
        deferred: ``[stages]``; how many microbatches' W a stage puts off at a time.

    Raises:
        ValueError: as :func:`one_f_one_b`, or a stage without a ``deferred``, or a negative one.
    """
    if len(deferred) != len(warmup) or min(deferred, default=0) < 0:
        raise ValueError(f"one deferred a stage, not negative, is needed, not {list(deferred)}")
    schedule = []
    for todo, late in zip(one_f_one_b(warmup, microbatches), deferred, strict=True):
        actions = []
        for action in todo:
            actions.append(action)
            if action.kind == "B" and action.microbatch >= late:
                actions.append(Action("W", action.microbatch - late))
        left = range(max(0, microbatches - late), microbatches)
        schedule.append(actions + [Action("W", m) for m in left])
    return schedule


def deferred_weights(
    tail_s: Sequence[float], weight_s: Sequence[float], room: Sequence[int]
) -> tuple[int, ...]:
    """How many microbatches' W each stage is to put off: as many as its last wait takes.

    Args:
        tail_s: ``[stages]``; from the end of a stage's last B to the end of the first stage's.
        weight_s: ``[stages]``; one W.
        room: ``[stages]``; how many there is memory for, and microbatches.
    """
    return tuple(
        min(most, math.ceil(tail / weight - 1e-9)) if weight > 0 else 0
        for tail, weight, most in zip(tail_s, weight_s, room, strict=True)
    )
