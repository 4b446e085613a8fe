"""Messages under way over shared resources, as fluids: each flow has its max-min fair rate.

Rates change only when a flow starts or ends, and only for flows that are joined with it by
something that is (or was) full.

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

from ray_train_geo.simulation.fair_share import max_min_rates
from ray_train_geo.simulation.sharing import SLACK
from ray_train_geo.simulation.work import Flow

__all__ = ["Network"]

_NEARLY = 1 - 1e-6
"""A resource of which flows want less than this part fills up for nobody: it is left out.
(The sum of what they want is kept up to date by adding and subtracting, so it is not exact.)"""


class Network:
    """At most one message of each flow, on its way through what flows share.

    At every instant at which something happens: :meth:`finish`, then :meth:`start` what starts,
    then :meth:`share`.

    Args:
        flows: those whose messages go through resources; each has a rate limit and a size.
        seconds_per_byte: ``[resources]``; above 0 where a flow uses it.
    """

    def __init__(self, flows: Sequence[Flow], seconds_per_byte: Sequence[float]) -> None:
        kinds: dict[tuple[float, tuple[int, ...]], int] = {}
        self._sizes = [flow.size_bytes for flow in flows]
        self._class = [
            kinds.setdefault((flow.seconds_per_byte, tuple(sorted(flow.resources))), len(kinds))
            for flow in flows
        ]
        self._uses = [resources for _, resources in kinds]
        self._limit = [1 / per_byte for per_byte, _ in kinds]
        self._capacity = {r: 1 / seconds_per_byte[r] for used in self._uses for r in used}
        # Of what is under way: who uses a resource, and what they could carry without it.
        self._users: dict[int, dict[int, None]] = {r: {} for r in self._capacity}
        self._wanted = dict.fromkeys(self._capacity, 0.0)

        classes = len(kinds)
        # Messages under way of a class: (what its clock shows when it is done, flow).
        self._under_way: list[list[tuple[float, int]]] = [[] for _ in range(classes)]
        self._served = [0.0] * classes  # the class's clock, in bytes ...
        self._at_s = [0.0] * classes  # ... as it stood then
        self._rate = [0.0] * classes
        self._count = [0] * classes  # messages under way when rates were last shared
        self._next_s = [math.inf] * classes  # when the class's next message is done
        self._events: list[tuple[float, int]] = []  # (time, class); outdated if not its next_s
        self._touched: set[int] = set()
        self._held_by: list[int | None] = [None] * classes  # the full resource, if not its limit

    def next_s(self) -> float:
        """When the next message will be done, if none starts before; infinity if none is there."""
        events = self._events
        while events and events[0][0] != self._next_s[events[0][1]]:
            heappop(events)
        return events[0][0] if events else math.inf

    def rate(self, flow: int) -> float:
        """Bytes per second that a message of ``flow`` has while it is under way."""
        return self._rate[self._class[flow]]

    def finish(self, now_s: float) -> list[int]:
        """Take the messages off that are done by now; returns their flows."""
        done = []
        events = self._events
        while events and events[0][0] <= now_s:
            time_s, c = heappop(events)
            if time_s != self._next_s[c]:
                continue
            self._next_s[c] = math.inf
            under_way = self._under_way[c]
            self._served[c], self._at_s[c] = under_way[0][0], now_s
            while under_way and under_way[0][0] <= self._served[c]:
                done.append(heappop(under_way)[1])
            self._touched.add(c)
        return done

    def start(self, flow: int, now_s: float) -> None:
        """Put a message of ``flow`` on its way; none of it must be there."""
        c = self._class[flow]
        self._advance(c, now_s)
        heappush(self._under_way[c], (self._served[c] + self._sizes[flow], flow))
        self._touched.add(c)

    def share(self, now_s: float) -> None:
        """Give everyone the rates that follow from what is under way now."""
        changed = [c for c in sorted(self._touched) if len(self._under_way[c]) != self._count[c]]
        if changed:
            self._recount(changed)
            for c, rate in self._new_rates(changed).items():
                if rate != self._rate[c]:
                    self._advance(c, now_s)
                    self._rate[c] = rate
                    self._touched.add(c)
        for c in self._touched:
            under_way = self._under_way[c]
            if under_way:
                left = max(0.0, under_way[0][0] - self._served[c])
                self._next_s[c] = self._at_s[c] + left / self._rate[c]
                heappush(self._events, (self._next_s[c], c))
            else:
                self._next_s[c] = math.inf
        self._touched.clear()

    def _advance(self, c: int, now_s: float) -> None:
        if self._under_way[c]:
            self._served[c] += self._rate[c] * (now_s - self._at_s[c])
        else:
            self._served[c] = 0.0  # small numbers are exact ones
        self._at_s[c] = now_s

    def _recount(self, changed: list[int]) -> None:
        for c in changed:
            count, before = len(self._under_way[c]), self._count[c]
            self._count[c] = count
            for r in self._uses[c]:
                self._wanted[r] += (count - before) * self._limit[c]
                if not count:
                    del self._users[r][c]
                elif not before:
                    self._users[r][c] = None

    def _new_rates(self, changed: list[int]) -> dict[int, float]:
        """Rates of those that changed, and of all others whose rates change with theirs.

        Tries with few classes, as if all others kept their rates, and takes in those for whom
        that is not fair any more, until there are none.
        """
        rates: dict[int, float] = {}
        taken = {c for c in changed if self._count[c]}
        for c in changed:
            for r in self._uses[c]:
                taken.update(d for d in self._users[r] if self._held_by[d] == r)
        while taken:
            rates = self._shares(sorted(taken | rates.keys()))
            taken = self._treated_unfairly(rates)
        return rates

    def _can_fill(self, r: int) -> bool:
        return self._wanted[r] > self._capacity[r] * _NEARLY

    def _shares(self, classes: list[int]) -> dict[int, float]:
        """Max-min fair rates of what other classes leave."""
        inside = set(classes)
        number: dict[int, int] = {}
        uses = [
            [number.setdefault(r, len(number)) for r in self._uses[c] if self._can_fill(r)]
            for c in classes
        ]
        free = []
        for r in number:
            left = self._capacity[r]
            for d in self._users[r]:
                if d not in inside:
                    left -= self._count[d] * self._rate[d]
            free.append(max(left, 0.0))
        counts = [self._count[c] for c in classes]
        limits = [self._limit[c] for c in classes]
        rates, held_by = max_min_rates(counts, limits, uses, free)
        resources = list(number)
        for c, i in zip(classes, held_by, strict=True):
            self._held_by[c] = None if i is None else resources[i]
        return dict(zip(classes, rates, strict=True))

    def _treated_unfairly(self, rates: dict[int, float]) -> set[int]:
        """Classes outside of ``rates`` that have too much or could have more beside them."""
        found = set()
        for r in {r for c in rates for r in self._uses[c] if self._can_fill(r)}:
            load = highest = 0.0
            full_for_us = False
            outside = []
            for d in self._users[r]:
                rate = rates.get(d)
                if rate is None:
                    outside.append(d)
                    rate = self._rate[d]
                else:
                    highest = max(highest, rate)
                    full_for_us = full_for_us or self._held_by[d] == r
                load += self._count[d] * rate
            loose = load * SLACK < self._capacity[r]
            for d in outside:
                has_too_much = full_for_us and self._rate[d] > highest * SLACK
                could_grow = loose or highest > self._rate[d] * SLACK
                if has_too_much or (could_grow and self._held_by[d] == r):
                    found.add(d)
        return found
