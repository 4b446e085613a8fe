"""How large each holder's shard should be in a sharded PS, when links are unequal.

A node with ``k`` of a group's ``n`` members that makes the part ``W`` of the sums sends, and gets,
``k (1 - W) + (n - k) W`` times the gradients.  So with few members on it, a node whose NIC is slow
should make little; and no member more than its slowest link to another carries in time::

    T = 10                  T = 6                          bytes of the sums that fit
    │ fast │█████████████   │ fast │███████                ahead of T: the least T for
    │ slow │███             │ slow │                       which all of them do is best
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ray_train_geo.planning.link_table import Floats, Ints, LinkTable
from ray_train_geo.planning.sync_cost import SyncGroups

__all__ = ["shares_by_speed", "stage_weights"]

_HALVINGS = 50
_DIGITS = 4


def stage_weights(groups: Sequence[SyncGroups], devices: Ints, table: LinkTable) -> Floats:
    """``[stages]``; the weight of each stage's shards, 1 where all members' are alike.

    A stage that is in several groups has their mean, by size.

    Args:
        devices: ``[stages]``; each stage's device number in ``table``.
    """
    weighted, total = np.zeros(len(devices)), np.zeros(len(devices))
    for group in groups:
        for size, members in zip(group.size_bytes.tolist(), group.members, strict=True):
            shares = shares_by_speed(size, devices[members], table)
            weighted[members] += size * len(members) * shares
            total[members] += size
    mean = np.where(total > 0, weighted / np.maximum(total, 1.0), 1.0)
    return np.round(mean, _DIGITS).astype(float)


def shares_by_speed(size_bytes: float, members: Ints, table: LinkTable) -> Floats:
    """``[members]``; parts of a group's sums with which it is done soonest, by NICs and links.

    Args:
        members: device numbers.
    """
    group = _Group(size_bytes, members, table)
    even = np.full(len(members), 1 / len(members))
    low, high = 0.0, group.even_s()
    if not np.isfinite(high):  # two of them have no link
        return even
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if group.shares(middle) is None:
            low = middle
        else:
            high = middle
    found = group.shares(high)
    return even if found is None else found


class _Group:
    """One group: what its nodes and members can make of the sums in a given time."""

    def __init__(self, size_bytes: float, members: Ints, table: LinkTable) -> None:
        nodes, self._node, self._here = np.unique(
            table.node[members], return_inverse=True, return_counts=True
        )
        nic = np.maximum(table.out_seconds_per_byte[nodes], table.in_seconds_per_byte[nodes])
        self._nic_s = size_bytes * nic  # [nodes]; for all gradients once
        latency, per_byte = table.hops(members[:, None], members[None, :])
        apart = members[:, None] != members[None, :]
        latency, link_s = np.where(apart, latency, 0.0), np.where(apart, size_bytes * per_byte, 0.0)
        self._latency_s: Floats = np.maximum(latency, latency.T).max(axis=1)
        self._link_s: Floats = np.maximum(link_s, link_s.T).max(axis=1)

    def even_s(self) -> float:
        """When all is done if the members' shards are alike."""
        n = len(self._node)
        nic_s = self._nic_s * 2 * self._here * (n - self._here) / n
        return float(max((2 * (self._latency_s + self._link_s / n)).max(), nic_s.max()))

    def shares(self, time_s: float) -> Floats | None:
        """``[members]``; shares with which all is done in ``time_s``; None if there are none."""
        n, here = len(self._node), self._here
        room_s = time_s / 2 - self._latency_s
        if room_s.min() < 0:
            return None
        with np.errstate(divide="ignore"):
            own = np.minimum(np.where(self._link_s > 0, room_s / self._link_s, 1.0), 1.0)
            fits = np.where(self._nic_s > 0, time_s / self._nic_s, np.inf) - here
        # With more than half of the members, a node sends the less the more it makes.
        slope = n - 2 * here
        if (fits[slope == 0] < 0).any() or (fits[slope > 0] < 0).any():
            return None
        ratio = np.divide(fits, slope, out=np.full(len(here), np.inf), where=slope != 0)
        most = np.minimum(np.bincount(self._node, own), np.where(slope > 0, ratio, 1.0))
        least = np.where(slope < 0, np.maximum(ratio, 0.0), 0.0)
        if (least > most).any() or least.sum() > 1 or most.sum() < 1:
            return None
        free = most.sum() - least.sum()
        made = least + (most - least) * ((1 - least.sum()) / free if free > 0 else 0.0)
        of_node = np.maximum(np.bincount(self._node, own), np.finfo(float).tiny)
        found: Floats = own * (made / of_node)[self._node]
        found /= found.sum()
        return found
