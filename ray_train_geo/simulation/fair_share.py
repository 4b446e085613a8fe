"""Max-min fair rates: how flows divide what they share, kept up to date as they come and go.

No flow can get more without taking from one that has no more than it (Bertsekas and Gallager,
*Data Networks*, section 6.5.2).  It is what TCP flows of equal round trips tend to.

Said by resource: each has a *level*, what the flows that it holds back get.  A flow's rate is the
lowest of its own limit and the levels of all that it uses, and a level is such that the resource
is just full, or infinite where all flows fit::

    two of class 0, limit 9, over a        a: 10 = 4 + 4 + 2         level 4
    one of class 1, limit 2, over a and b  b:  6 = 2 + 4             level 4
    one of class 2, limit 4, over b        rates: 4, 2, 4

When a flow comes or goes, levels are found anew for what it uses, then for what is used by those
whose rates that changed, and so on.  That ends: nobody who uses the resource with the lowest level
is held lower elsewhere, so its level is final once it was looked at; then the next one's is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import attrgetter

__all__ = ["SLACK", "FlowClass", "Resource", "share_anew"]

SLACK = 1 + 1e-9
"""Flows that exceed a capacity by less than this do so by rounding only."""
_STILL = 1e-12
"""A level that moves by less than this part stays: two that are equal must not chase each other."""


class Resource:
    """What flows share: a NIC, an uplink.

    Attributes:
        level: the rate of those that it holds back; infinity if there are none.
        load: of all users together, in bytes per second.
        full: the load above which it holds somebody back.
        users: who has flows under way here, and what else those use.
    """

    __slots__ = ("_capacity", "full", "level", "load", "users")

    def __init__(self, capacity: float) -> None:
        self._capacity = capacity  # bytes per second
        self.full = capacity * SLACK
        self.level = math.inf
        self.load = 0.0
        self.users: dict[FlowClass, tuple[Resource, ...]] = {}

    def find_level(self) -> list[FlowClass]:
        """Set ``level`` by those of all others; returns the users, with their ``bound`` set."""
        count = 0
        for user, others in self.users.items():
            bound = user.limit
            for other in others:
                if other.level < bound:
                    bound = other.level
            user.bound = bound
            count += user.count
        level, free = math.inf, self._capacity
        users = sorted(self.users, key=_BOUND)
        for user in users:
            if user.bound * count >= free:
                level = free / count
                break
            free -= user.bound * user.count
            count -= user.count
        if level == math.inf or abs(level / self.level - 1) > _STILL:
            self.level = level
        return users


class FlowClass:
    """Flows with one limit that use the same resources, and so always have the same rate.

    Args:
        number: tells classes apart.
        limit: most that one of its flows can carry, in bytes per second.

    Attributes:
        count: flows under way when rates were last shared.
        rate: of each of them, in bytes per second.
        served: bytes that a flow that is always under way has been served until ``at_s``.
        bound: what they could have if it were not for the resource that is looked at.
        under_way: a heap of messages: (what ``served`` is when it is done, flow).
        next_s: when the first of them is done.
    """

    __slots__ = (
        "_uses",
        "at_s",
        "bound",
        "count",
        "limit",
        "next_s",
        "number",
        "rate",
        "served",
        "under_way",
    )

    def __init__(self, number: int, limit: float, resources: Sequence[Resource]) -> None:
        self.number = number
        self.limit = self.bound = limit
        self.count = 0
        self.rate = self.served = self.at_s = 0.0
        self.under_way: list[tuple[float, int]] = []
        self.next_s = math.inf
        self._uses = [(r, tuple(q for q in resources if q is not r)) for r in resources]

    def recount(self, moved: dict[Resource, None]) -> None:
        """Flows have come or gone; puts resources whose levels that may move into ``moved``."""
        before, self.count = self.count, len(self.under_way)
        if not before:
            self.rate = self.limit
            for resource, _ in self._uses:
                if resource.level < self.rate:
                    self.rate = resource.level
        more = (self.count - before) * self.rate
        for resource, others in self._uses:
            if not self.count:
                del resource.users[self]
            elif not before:
                resource.users[self] = others
            # What is empty starts anew, so that rounding does not add up.
            resource.load = resource.load + more if resource.users else 0.0
            if resource.level < math.inf or resource.load > resource.full:
                moved[resource] = None


_BOUND = attrgetter("bound")


def share_anew(moved: dict[Resource, None], now_s: float, touched: dict[FlowClass, None]) -> None:
    """Find the levels and rates that follow from a change.

    Args:
        moved: resources whose levels may not be right any more; empty afterwards.
        touched: gets the classes whose rates change; they are served at the old ones until now.
    """
    while moved:
        resource, _ = moved.popitem()
        for user in resource.find_level():
            rate = user.bound if user.bound < resource.level else resource.level
            if rate == user.rate:
                continue
            if user.at_s != now_s:
                user.served += user.rate * (now_s - user.at_s)
                user.at_s = now_s
            touched[user] = None
            more = (rate - user.rate) * user.count
            user.rate = rate
            resource.load += more
            for other in resource.users[user]:
                other.load += more
                if other.level < math.inf or other.load > other.full:
                    moved[other] = None
