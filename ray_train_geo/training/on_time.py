"""Wakes up on time: for what imitates devices and links by sleeping."""

from __future__ import annotations

import contextlib
import os
import sys

__all__ = ["on_time"]

_PRIORITY = 1
"""Below the geo lab's switch."""


def on_time() -> None:
    """Ask for real-time priority for this thread, and those that it starts, where that is allowed.

    A device of one's own is not late because somebody else uses the machine; a thread that sleeps
    in its place is, by milliseconds for each action.
    """
    if sys.platform == "linux":
        with contextlib.suppress(PermissionError):
            os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(_PRIORITY))
