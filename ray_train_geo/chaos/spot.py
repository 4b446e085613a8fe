"""A spot trace as a chaos run follows it: fewer nodes, faster (level 0).

::

    trace     32 nodes at most, 11 h
      | a share of its places     at most so many nodes, each as short-lived as in the trace
      | until, speedup            11 h become minutes
      | notice                    in seconds of the run: warnings are not compressed
    what happens, in seconds after the first committed step
"""

from __future__ import annotations

import math
from dataclasses import replace

from ray_train_geo.cluster.traces import SpotTrace
from ray_train_geo.errors import InputError

__all__ = ["followed", "longest_notice_s", "nodes_at_first"]


def followed(
    trace: SpotTrace,
    *,
    speedup: float,
    max_nodes: int,
    until_h: float | None = None,
    notice_s: float | None = None,
) -> SpotTrace:
    """What happens to at most ``max_nodes`` nodes, from when the first of them is there.

    Args:
        until_h: hours of the trace.
        notice_s: warning before each removal that the trace does not announce, in seconds as the
            run sees them.

    Raises:
        InputError: a number that makes no sense, or nothing is left to follow.
    """
    for name, value in (("speedup", speedup), ("until-h", until_h), ("notice-s", notice_s)):
        if value is not None and not 0 < value < math.inf:
            raise InputError(f"--{name} is {value:g}: give a number above 0")
    share = trace.thinned(max_nodes)
    if until_h is not None:
        share = share.until(until_h * 3600)
    if not share.events:
        raise InputError(
            f"trace {trace.name}: none of {max_nodes} nodes is up by then; raise --until-h or "
            "--max-nodes"
        )
    first_s = share.events[0].time_s
    if share.end_s <= first_s:
        raise InputError(f"trace {trace.name}: it ends when it begins; say --until-h")
    events = tuple(replace(e, time_s=e.time_s - first_s) for e in share.events)
    played = replace(share, events=events, end_s=share.end_s - first_s).faster(speedup)
    return played if notice_s is None else played.with_notice(notice_s)


def nodes_at_first(trace: SpotTrace) -> list[str]:
    """Those that are there when it begins."""
    return [e.node for e in trace.events if e.op == "add" and e.time_s == 0]


def longest_notice_s(trace: SpotTrace) -> float | None:
    """From a notice to the removal; None where there is no notice."""
    noticed: dict[str, float] = {}
    found = []
    for e in trace.events:
        if e.op == "notice":
            noticed.setdefault(e.node, e.time_s)
        elif e.op == "remove" and e.node in noticed:
            found.append(e.time_s - noticed.pop(e.node))
    return max(found, default=None)
