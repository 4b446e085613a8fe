"""GPipe: all forwards, then all backwards (Huang et al., 2019).

Four stages, four microbatches, digits forward, letters backward, F and B one slot each::

    0123......abcd
    .0123....abcd.
    ..0123..abcd..
    ...0123abcd...

It hides any latency, because nothing waits for a round trip before the last forward; it pays by
holding the activations of every microbatch.
"""

from __future__ import annotations

from ray_train_geo.schedule.actions import Action

__all__ = ["gpipe"]


def gpipe(stages: int, microbatches: int) -> list[list[Action]]:
    """The actions of each stage, in order: ``[stages][2 * microbatches]``.

    Raises:
        ValueError: fewer than one stage or microbatch.
    """
    if stages < 1 or microbatches < 1:
        raise ValueError(f"gpipe needs stages and microbatches, got {stages} and {microbatches}")
    forwards = [Action("F", m) for m in range(microbatches)]
    backwards = [Action("B", m) for m in range(microbatches)]
    return [forwards + backwards for _ in range(stages)]
