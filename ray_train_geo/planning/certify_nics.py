"""What stages ask of the NICs that the devices of a node share.

**Sync.**  A node's NIC is done with what starts at ``r_j`` and takes ``q_j`` by ``T`` only if the
single machine of scheduling theory is: read backwards from ``T``, job ``j`` must be complete after
``T - r_j``, so that (Queyranne, 1993)  ``sum q_j (T - r_j) >= ((sum q_j)^2 + sum q_j^2) / 2``.
The square is above each of its tangents, so for every ``t >= 0`` the stages of a node satisfy::

    sum over stages of  q (r + q / 2 - T) + t q   <=   t^2 / 2

**Hops.**  If ``f`` devices of a pipeline are on one node, the activations and gradients that come
to them from other nodes pass its NIC twice for every microbatch (once at either end of the
pipeline): for each device ``2 u`` times with ``u = 1 / f``.  The ``u`` of a node add up to the
pipelines that it serves, and none is below ``1 / (devices - pipelines + 1)``.

Both are sums over stages of what each asks for.  `certify_packing` finds prices for them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ray_train_geo.planning.link_table import Floats, Ints
from ray_train_geo.spec import GradientSyncName

__all__ = ["ENDS", "NicPrices", "NicUse", "StageKind", "member_share"]

StageKind = Literal["first", "inner", "last", "only"]

ENDS: Mapping[StageKind, int] = {"first": 1, "inner": 0, "last": 1, "only": 2}
"""Ends of the pipeline that a stage is at, where no messages pass."""

_ALL = slice(None)


def member_share(mode: GradientSyncName, members: int, together: Ints) -> Floats:
    """What each member of a group sends over its node's NIC at least, in parts of the gradients.

    A node's share is counted as if all of its members had the same.

    Args:
        together: ``[...]``; most members that are on one node.
    """
    most = np.minimum(together, members)
    if mode == "sharded_ps":
        found: Floats = 2.0 * (members - most) / max(members, 1)
        return found
    apart = most < members
    if mode == "allreduce":  # the ring leaves every node that it enters
        return np.where(apart, 2.0 * (members - 1) / max(members, 1) / most, 0.0)
    # The server's node gets all that others send, every other node what its own members do.
    return np.where(apart, np.minimum(1.0, (members - most) / most), 0.0)


@dataclass(frozen=True, slots=True, eq=False)
class NicPrices:
    """Prices, ``[classes]`` each.

    Args:
        early: of the sync's inequality, all tangents together.
        load: sum over tangents of price times ``t``.
        hop: of a second that messages use.
        touch: what it is worth that a pipeline uses the node.
    """

    early: Floats
    load: Floats
    hop: Floats
    touch: Floats


@dataclass(frozen=True, slots=True, eq=False)
class NicUse:
    """What stages on nodes of several devices ask of the NIC.

    Args:
        classes: of such nodes; what follows counts only these.
        sync_s: by kind of stage, ``[layers, classes]``: ``q`` of a stage of 1, 2, ... layers.
        early: by kind of stage, ``[n, layers, classes]``: ``q (r + q / 2 - T)`` if no layer were
            above.
        delay_s: ``[n, layers]``; how much later stages behind so many layers end.
        hop_s: ``[n, classes]``; for which all messages of one kind pass a NIC.
        left_s: ``[n]``; in which all must be done.
        least_touch: ``[classes]``; the smallest ``u``.
        tangents: ``[tangents, classes]``; some ``t``.
    """

    classes: Ints
    sync_s: Mapping[StageKind, Floats]
    early: Mapping[StageKind, Floats]
    delay_s: Floats
    hop_s: Floats
    left_s: Floats
    least_touch: Floats
    tangents: Floats

    def at(self, prices: NicPrices) -> Asks:
        """What stages cost at these prices."""
        early, load, hop, touch = (
            x[self.classes] for x in (prices.early, prices.load, prices.hop, prices.touch)
        )
        fixed = {kind: early * self.early[kind] + load * self.sync_s[kind] for kind in self.sync_s}
        delayed = {kind: early * sync for kind, sync in self.sync_s.items()}
        touches = self.touches(prices)
        hops = {}
        for kind in self.sync_s:
            u = np.ones_like(touches) if kind == "only" else touches
            ends = ENDS[kind]
            hops[kind] = (2 * u - ends) * self.hop_s * hop - u * touch
        return Asks(fixed, delayed, hops, self.delay_s)

    def touches(self, prices: NicPrices) -> Floats:
        """``[n, classes]``; the ``u`` that is cheapest."""
        hop, touch = prices.hop[self.classes], prices.touch[self.classes]
        return np.where(2 * self.hop_s * hop > touch, self.least_touch, 1.0)

    def asked(self, chain: Sequence[tuple[int, int]], question: int, prices: NicPrices) -> Floats:
        """``[4, classes]``; how much of each of the four prices a chain pays.

        Args:
            chain: class (of all) and layers of each stage.
        """
        number = {int(c): i for i, c in enumerate(self.classes)}
        touches = self.touches(prices)[question]
        found = np.zeros((4, len(prices.hop)))
        above = 0
        for stage, (c, layers) in enumerate(chain):
            i = number.get(c)
            if i is not None:
                ends = (stage == 0) + (stage == len(chain) - 1)
                kind: StageKind = (
                    "only" if ends == 2 else "first" if stage == 0 else "last" if ends else "inner"
                )
                sync_s = self.sync_s[kind][layers - 1, i]
                u = 1.0 if ends == 2 else touches[i]
                early = self.early[kind][question, layers - 1, i]
                early += self.delay_s[question, above] * sync_s
                hop_s = (2 * u - ends) * self.hop_s[question, i]
                found[:, c] += early, sync_s, hop_s, u
            above += layers
        return found


@dataclass(frozen=True, slots=True, eq=False)
class Asks:
    """What stages of each kind cost at given prices of NICs."""

    fixed: Mapping[StageKind, Floats]
    delayed: Mapping[StageKind, Floats]
    hops: Mapping[StageKind, Floats]
    delay_s: Floats

    def cost(self, kind: StageKind, above: int, most: int, questions: int | slice = _ALL) -> Floats:
        """``[questions, most, classes]``; of 1, 2, ... ``most`` layers behind ``above``."""
        fixed, hops = self.fixed[kind][questions], self.hops[kind][questions]
        delay_s = self.delay_s[questions, above, None, None]
        cost: Floats = fixed[..., :most, :] + delay_s * self.delayed[kind][:most]
        cost += hops[..., None, :]
        return cost
