"""1F1B whose neighbouring stages meet to exchange messages, as Megatron-LM's do.

A stage sends its activation and receives a gradient in one exchange, and does nothing until both
have come; the other end does the same the other way round.  So neighbours wait for each other, and
latency counts twice in every microbatch::

    stage 0   F . [exchange] B      [F . [exchange] B
    stage 1   B . [exchange] F      [B . [exchange] F
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Exchange", "makespan_s"]

_Key = tuple[str, int, str, int]
"""("send" or "receive", hop, "down" or "up", how many before it)."""


@dataclass(frozen=True, slots=True)
class Exchange:
    """A hop between neighbours: what a message takes on the wire, and its way."""

    transfer_s: float
    latency_s: float


def makespan_s(
    forward_s: Sequence[float],
    backward_s: Sequence[float],
    hops: Sequence[Exchange],
    microbatches: int,
) -> float:
    """From the first forward to the end of the last backward.

    Args:
        forward_s, backward_s: ``[stages]``; of one microbatch.
        hops: ``[stages - 1]``; equal both ways.

    Raises:
        ValueError: lengths that do not match, or no microbatch.
    """
    stages = len(forward_s)
    if not (stages == len(backward_s) == len(hops) + 1) or microbatches < 1:
        raise ValueError("forward_s, backward_s, stages - 1 hops and a microbatch are needed")
    programs = [
        _program(s, stages, microbatches, forward_s[s], backward_s[s]) for s in range(stages)
    ]
    position, now = [0] * stages, [0.0] * stages
    counts: dict[tuple[str, int, str], int] = {}
    posted_s: dict[_Key, float] = {}
    meeting: list[list[_Key]] = [[] for _ in range(stages)]
    waiting = list(range(stages))
    while waiting:
        s = waiting.pop()
        while position[s] < len(programs[s]):
            step = programs[s][position[s]]
            if isinstance(step, float):
                now[s] += step
                position[s] += 1
                continue
            if not meeting[s]:
                for message in step:
                    number = counts.get(message, 0)
                    counts[message] = number + 1
                    meeting[s].append((*message, number))
                    posted_s[meeting[s][-1]] = now[s]
                    other = message[1] if message[1] != s else message[1] + 1
                    if other not in waiting:
                        waiting.append(other)
            done = _done_s(meeting[s], posted_s, hops)
            if done is None:
                break
            now[s], meeting[s] = max(now[s], done), []
            position[s] += 1
    return max(now)


def _done_s(
    messages: Sequence[_Key], posted_s: dict[_Key, float], hops: Sequence[Exchange]
) -> float | None:
    """When all messages of an exchange are through; None if another end is not there yet."""
    done = 0.0
    for action, hop, way, number in messages:
        other = posted_s.get(("receive" if action == "send" else "send", hop, way, number))
        if other is None:
            return None
        left = max(other, posted_s[action, hop, way, number]) + hops[hop].transfer_s
        done = max(done, left + (hops[hop].latency_s if action == "receive" else 0.0))
    return done


_Step = float | list[tuple[str, int, str]]


def _program(
    stage: int, stages: int, microbatches: int, forward_s: float, backward_s: float
) -> list[_Step]:
    """What a stage does, in order: seconds of compute, and exchanges."""
    above = [("receive", stage - 1, "down")] if stage > 0 else []
    below = [("send", stage, "down")] if stage < stages - 1 else []
    gradient = [("receive", stage, "up")] if stage < stages - 1 else []
    back = [("send", stage - 1, "up")] if stage > 0 else []
    warmup = min(stages - stage - 1, microbatches)
    steady = microbatches - warmup
    steps: list[_Step] = []
    for _ in range(warmup):
        steps += [above, forward_s, below]
    if steady:
        steps.append(above)
    for i in range(steady):
        more = above if i < steady - 1 else []
        steps += [forward_s, below + gradient, backward_s, back + more]
    for _ in range(warmup):
        steps += [gradient, backward_s, back]
    return [step for step in steps if step != []]
