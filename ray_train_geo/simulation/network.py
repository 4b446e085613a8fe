"""Messages under way over shared resources, as fluids: each flow has its max-min fair rate.

Flows of one class - same limit, same resources - always have the same rate, so a class keeps one
clock of what each of its flows has been served, and a message is done when that clock has gone on
by its size (virtual time, as in generalized processor sharing: Parekh and Gallager, 1993)::

    served   0 --------- 40 -------- 70 ------ 100
    message 1 starts (70 bytes)       ends: 70
    message 2             starts (60)            ends: 40 + 60
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from heapq import heappop, heappush

from ray_train_geo.simulation.fair_share import FlowClass, Resource, share_anew
from ray_train_geo.simulation.work import Flow

__all__ = ["Network"]


class Network:
    """At most one message of each flow, on its way through what flows share.

    At every instant at which something happens: :meth:`finish`, then :meth:`start` what starts,
    then :meth:`share`.

    Args:
        flows: those whose messages go through resources; each has a rate limit and a size.
        seconds_per_byte: ``[resources]``; above 0 where a flow uses it.
    """

    def __init__(self, flows: Sequence[Flow], seconds_per_byte: Sequence[float]) -> None:
        used = sorted({r for flow in flows for r in flow.resources})
        resources = {r: Resource(1 / seconds_per_byte[r]) for r in used}
        kinds: dict[tuple[float, tuple[int, ...]], FlowClass] = {}
        self._class: list[FlowClass] = []  # of each flow
        for flow in flows:
            kind = flow.seconds_per_byte, tuple(sorted(flow.resources))
            if kind not in kinds:
                over = [resources[r] for r in kind[1]]
                kinds[kind] = FlowClass(len(kinds), 1 / flow.seconds_per_byte, over)
            self._class.append(kinds[kind])
        self._classes = list(kinds.values())
        self._sizes = [flow.size_bytes for flow in flows]
        self._events: list[tuple[float, int]] = []  # (time, class); outdated if not its next_s
        self._touched: dict[FlowClass, None] = {}  # in this instant

    def next_s(self) -> float:
        """When the next message will be done, if none starts before; infinity if none is there."""
        events, classes = self._events, self._classes
        while events and events[0][0] != classes[events[0][1]].next_s:
            heappop(events)
        return events[0][0] if events else math.inf

    def rate(self, flow: int) -> float:
        """Bytes per second that a message of ``flow`` has while it is under way."""
        return self._class[flow].rate

    def finish(self, now_s: float) -> list[int]:
        """Take the messages off that are done by now; returns their flows."""
        done = []
        events = self._events
        while events and events[0][0] <= now_s:
            time_s, number = heappop(events)
            c = self._classes[number]
            if time_s != c.next_s:
                continue
            c.next_s = math.inf
            c.served, c.at_s = c.under_way[0][0], now_s
            while c.under_way and c.under_way[0][0] <= c.served:
                done.append(heappop(c.under_way)[1])
            self._touched[c] = None
        return done

    def start(self, flow: int, now_s: float) -> None:
        """Put a message of ``flow`` on its way; none of it must be there."""
        c = self._class[flow]
        if c.under_way:
            c.served += c.rate * (now_s - c.at_s)
        else:
            c.served = 0.0  # small numbers are exact ones
        c.at_s = now_s
        heappush(c.under_way, (c.served + self._sizes[flow], flow))
        self._touched[c] = None

    def share(self, now_s: float) -> None:
        """Give everyone the rates that follow from what is under way now."""
        touched, moved = self._touched, dict[Resource, None]()
        for c in touched:
            if len(c.under_way) != c.count:
                c.recount(moved)
        if moved:
            share_anew(moved, now_s, touched)
        for c in touched:
            if c.under_way:
                left = c.under_way[0][0] - c.served
                c.next_s = c.at_s + (left / c.rate if left > 0 else 0.0)
                heappush(self._events, (c.next_s, c.number))
            else:
                c.next_s = math.inf
        touched.clear()
