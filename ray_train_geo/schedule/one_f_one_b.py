"""1F1B with a warmup of one's choice per stage (Narayanan et al., 2019; latency: FINDINGS.md).

Four stages, four microbatches, digits forward, letters backward, F and B one slot each; the usual
warmup of ``stages - 1 - stage`` forwards::

    0123...a.b.c.d
    .012..a3b.c.d.
    ..01.a2b3c.d..
    ...0a1b2c3d...

Stage ``s`` holds at most ``warmup[s] + 1`` microbatches, where GPipe holds all.  When hops take
time, the usual warmup leaves a stage waiting for a gradient that is still under way; each further
warmup forward covers one more period of that round trip, for one more microbatch held.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from ray_train_geo.schedule.actions import Action
from ray_train_geo.schedule.timeline import Hop, timeline

__all__ = ["one_f_one_b", "validate", "warmup_forwards"]

_NEGLIGIBLE = 0.01
"""A round trip under this part of the period gets no microbatch of its own: it costs less than
it would hold in memory."""


def one_f_one_b(warmup: Sequence[int], microbatches: int) -> list[list[Action]]:
    """The actions of each stage: ``warmup[s]`` forwards, then F, B pairs, then the other Bs.

    A warmup of ``microbatches - 1`` or more is GPipe.

    Raises:
        ValueError: no stage, no microbatch, a negative warmup, or a warmup that grows along the
            pipeline (stage ``s`` would wait for a gradient while ``s + 1`` waits for a forward).
    """
    if not warmup or microbatches < 1:
        raise ValueError(f"1f1b needs stages and microbatches, got {warmup} and {microbatches}")
    held = [min(w, microbatches - 1) for w in warmup]
    if min(held) < 0 or any(a < b for a, b in pairwise(held)):
        raise ValueError(f"warmup must not be negative nor grow along the pipeline: {list(warmup)}")
    forwards = [Action("F", m) for m in range(microbatches)]
    backwards = [Action("B", m) for m in range(microbatches)]
    schedule = []
    for w in held:
        steady = [a for pair in zip(forwards[w:], backwards, strict=False) for a in pair]
        schedule.append(forwards[:w] + steady + backwards[microbatches - w :])
    return schedule


def warmup_forwards(
    stages: int,
    microbatches: int,
    hop_s: Sequence[float],
    forward_s: Sequence[float],
    backward_s: Sequence[float],
    max_in_flight: Sequence[int],
    extra: int | None = None,
) -> list[int]:
    """Forwards that each stage runs before its first backward, non-increasing along the pipeline.

    The usual ``stages - 1 - s``, and for each downstream hop as many more as its round trip lasts
    periods (a period is F + B of the slowest stage), rounded up hop by hop: rounding up only their
    sum is not enough, because strict F, B turns lose up to a period at every stage.

    Args:
        hop_s: ``[stages - 1]``; one-way time of a message from ``s`` to ``s + 1``, transfer
            included, in seconds (for unequal directions: their mean).
        forward_s, backward_s: ``[stages]``; seconds of one microbatch.
        max_in_flight: ``[stages]``; microbatches that stage ``s`` has memory for, at least 1.
        extra: that many per downstream hop, instead of those that the round trips ask for.

    Raises:
        ValueError: lengths that do not match, or a stage without memory for one microbatch.
    """
    if len(hop_s) != stages - 1 or not (
        stages == len(forward_s) == len(backward_s) == len(max_in_flight)
    ):
        raise ValueError(f"one value a stage ({stages}) and one a hop ({stages - 1}) are needed")
    if microbatches < 1 or min(max_in_flight) < 1:
        raise ValueError("every stage needs a microbatch, and memory for one")
    period_s = max(f + b for f, b in zip(forward_s, backward_s, strict=True))
    warmup = [0] * stages
    for s in reversed(range(stages - 1)):
        warmup[s] = warmup[s + 1] + 1
        if extra is not None:
            warmup[s] += extra
        elif 2 * hop_s[s] > _NEGLIGIBLE * period_s:
            # No more than all microbatches: keeps a period near zero from giving infinity.
            round_trip = min(2 * hop_s[s], microbatches * period_s)
            warmup[s] += math.ceil(round_trip / period_s - 1e-9) if period_s > 0 else microbatches
    limit = microbatches - 1
    for s in range(stages):
        limit = min(limit, max_in_flight[s] - 1)
        warmup[s] = min(warmup[s], limit)
    return warmup


def validate(actions: Sequence[Sequence[Action]]) -> None:
    """Check one pipeline's schedule: every F and B once on every stage, and no deadlock.

    If there is any W, every W once, too, and after its B.

    Raises:
        ValueError: which stage misses or repeats what, or which stages wait for each other.
    """
    if not actions:
        raise ValueError("a schedule needs at least one stage")
    kinds = "FBW" if any(a.kind == "W" for todo in actions for a in todo) else "FB"
    microbatches = len(actions[0]) // len(kinds)
    expected = {(kind, m) for kind in kinds for m in range(microbatches)}
    for s, todo in enumerate(actions):
        given = [(a.kind, a.microbatch) for a in todo]
        if len(given) != len(expected) or set(given) != expected:
            missing = sorted(f"{k}{m}" for k, m in expected - set(given))
            raise ValueError(
                f"stage {s}: every {' and '.join(kinds)} of {microbatches} microbatches must occur "
                f"once; {len(given)} actions, missing: {', '.join(missing) or 'none'}"
            )
        for i, (kind, m) in enumerate(given):
            if kind == "W" and ("B", m) not in given[:i]:
                raise ValueError(f"stage {s}: W{m} needs B{m} before it")
        # B after F needs no check of its own: B waits for a gradient, which comes from this
        # stage's own F through the stages below, so the wrong order is a deadlock.
    hops = [Hop(0.0, 0.0)] * (len(actions) - 1)
    ones = [1.0] * len(actions)
    timeline(actions, ones, ones, hops, hops, weight_s=ones)
