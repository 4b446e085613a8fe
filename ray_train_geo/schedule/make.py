"""A pipeline's schedule by its name."""

from __future__ import annotations

from collections.abc import Sequence

from ray_train_geo.schedule.actions import Action
from ray_train_geo.schedule.gpipe import gpipe
from ray_train_geo.schedule.one_f_one_b import one_f_one_b
from ray_train_geo.schedule.zero_bubble import zero_bubble
from ray_train_geo.spec import ScheduleName

__all__ = ["make_schedule"]


def make_schedule(
    name: ScheduleName, warmup: Sequence[int], deferred: Sequence[int], microbatches: int
) -> list[list[Action]]:
    """The actions of each stage, in order.

    Args:
        warmup: ``[stages]``; what GPipe does not look at.
        deferred: ``[stages]``; what only zero-bubble looks at.

    Raises:
        ValueError: as the schedule's own function.
    """
    if name == "gpipe":
        return gpipe(len(warmup), microbatches)
    if name == "1f1b":
        return one_f_one_b(warmup, microbatches)
    return zero_bubble(warmup, deferred, microbatches)
