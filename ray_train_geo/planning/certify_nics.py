"""What summing gradients over NICs that devices share takes at least.

Groups that start at the same moment or later share a NIC one behind the other.  Of a group of
``n`` with ``k`` members on a node, a sharded server moves ``2 k (n - k) / n`` times the gradients
over that node's NIC, a ring at least ``2 (n - 1) / n`` times; nothing, if all are there.
"""

from __future__ import annotations

import numpy as np

from ray_train_geo.planning.link_table import Floats, Ints, LinkTable
from ray_train_geo.spec import GradientSyncName

__all__ = ["busiest_nic_s", "node_share"]


def node_share(mode: GradientSyncName, members: int, node_size: Ints) -> Floats:
    """What a group takes of the NIC of each node that it touches at least, in parts of ``G``.

    Of the slower direction; with a central server of both, one after the other.  A group that fits
    into a node may leave NICs alone.

    Args:
        members: fewest of the group.
        node_size: ``[...]``; devices of a node.
    """
    return np.where(members > node_size, _crossing(mode, members), 0.0)


def busiest_nic_s(
    table: LinkTable,
    mode: GradientSyncName,
    firsts: int,
    members: int,
    token_bytes: float,
    first_bytes: float,
) -> float:
    """Seconds that some NIC is busy once the last of the first stages begins its last backward.

    It has to move a tied token matrix, of the first and last stages, and what the first stages
    hold besides, wherever they all are: the least over all ways to put them on nodes.

    Args:
        firsts, members: fewest first stages; fewest first and last stages, one-stage pipelines
            counted once.
        token_bytes, first_bytes: of the tied matrix, and of what all first stages have in common.
    """
    out, into = table.out_seconds_per_byte, table.in_seconds_per_byte
    nic = out + into if mode == "central_ps" else np.maximum(out, into)
    kinds, count = np.unique(
        np.stack([np.bincount(table.node), nic], axis=1), axis=0, return_counts=True
    )
    here = np.arange(min(members, int(kinds[:, 0].max())) + 1)
    # [kinds, first stages here, members here]; infinite where it cannot be.
    busy_s = token_bytes * _parts(mode, members, here)[None, None, :] + (
        first_bytes * _parts(mode, firsts, here)[None, :, None]
    )
    busy_s = busy_s * kinds[:, 1, None, None]
    possible = (here[:, None] <= here) & (here <= kinds[:, 0, None, None])
    busy_s = np.where(possible & (here <= firsts)[:, None], busy_s, np.inf)
    levels = np.unique(busy_s[np.isfinite(busy_s)])
    low, high = 0, len(levels) - 1
    while low < high:
        middle = (low + high) // 2
        fits = busy_s <= levels[middle] * (1 + 1e-12)
        if _room(fits, count, here, firsts) >= members:
            high = middle
        else:
            low = middle + 1
    return float(levels[low])


def _room(fits: Floats, count: Ints, here: Ints, firsts: int) -> float:
    """Most members that there is room for, ``firsts`` first stages among them; 0: not for those.

    By fractions of nodes, so perhaps too many.

    Args:
        fits: ``[kinds, first stages, members]``; what a node can have.
        count: ``[kinds]``; of the nodes.
    """
    without = np.where(fits[:, 0], here, 0).max(axis=1)
    most_firsts = np.where(fits.any(axis=2), here, 0).max(axis=1)
    with_firsts = np.where(fits[:, 1:].any(axis=1), here, 0).max(axis=1)
    room, left = float((without * count).sum()), float(firsts)
    lost = np.where(most_firsts > 0, (without - with_firsts) / np.maximum(most_firsts, 1), 0.0)
    for kind in np.argsort(lost, kind="stable"):
        nodes = min(float(count[kind]), left / most_firsts[kind]) if most_firsts[kind] else 0.0
        room -= nodes * float(without[kind] - with_firsts[kind])
        left -= nodes * float(most_firsts[kind])
    return room + 1e-9 if left <= 1e-9 else 0.0


def _parts(mode: GradientSyncName, members: int, here: Ints) -> Floats:
    """What ``here`` members of a group take of their node's NIC at least, in parts of ``G``."""
    if mode == "sharded_ps":
        return np.maximum(2.0 * here * (members - here) / members, 0.0)
    return np.where((here > 0) & (here < members), _crossing(mode, members), 0.0)


def _crossing(mode: GradientSyncName, members: int) -> float:
    return 1.0 if mode == "central_ps" else 2.0 * (members - 1) / members
