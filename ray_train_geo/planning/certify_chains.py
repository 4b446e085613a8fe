"""The cheapest chain of devices that holds the model, for many questions at once.

A chain is a pipeline whose devices are known by class only.  How many layers a device can take
depends on where in the chain it stands: behind ``l`` layers a microbatch arrives later, so less
time is left.  Dynamic programming from the last layer to the first, over the layers above::

    cost[l] = min over classes c, k <= most[l, c] of  price[c] + nic[l, k, c] + hop + cost[l + k]

where ``nic`` is the price of what the stage asks of its node's NIC (`certify_nics`), and ``hop``
of the way to the next stage's place (`certify_ways`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ray_train_geo.planning.certify_nics import NicPrices, NicUse, StageKind
from ray_train_geo.planning.certify_ways import Ways
from ray_train_geo.planning.link_table import Floats, Ints

__all__ = ["Chain", "Chains", "Cheapest"]


@dataclass(frozen=True, slots=True)
class Chain:
    """One cheapest chain: class and layers of each stage."""

    classes: tuple[int, ...]
    layers: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Chains:
    """How many layers a device can take, in each of ``n`` questions, and how stages may follow.

    Args:
        first: ``[n, classes]``; on a first stage that is not the last.
        inner, last: ``[n, layers or 1, classes]``; on an inner (the last) stage that stands
            behind that many layers.
        only: ``[n, classes]``; on a pipeline's only stage.
        depth: that many stages; None: any number.
        nics: what stages ask of their nodes' NICs; None: nothing.
        ways: where stages may follow each other; None: everywhere.
    """

    layers: int
    first: Ints
    inner: Ints
    last: Ints
    only: Ints
    depth: int | None = None
    nics: NicUse | None = None
    ways: Ways | None = None

    def cheapest(
        self, price: Floats, nic_prices: NicPrices | None = None, uplink_price: Floats | None = None
    ) -> Cheapest:
        """The cheapest chain for every question.

        Args:
            price: ``[classes]``; of one device.
            nic_prices, uplink_price: None: NICs, or uplinks, are free.
        """
        return Cheapest(self, price, nic_prices, uplink_price)

    def most(self, kind: StageKind, above: int) -> Ints:
        """``[n, classes]``; most layers on a stage of that kind behind so many layers."""
        if kind == "first":
            return self.first
        if kind == "only":
            return self.only
        table = self.inner if kind == "inner" else self.last
        found: Ints = table[:, min(above, table.shape[1] - 1)]
        return found


class Cheapest:
    """The dynamic program's tables, and the chains that they stand for.

    Attributes:
        cost: ``[n]``; the lowest price of a chain, infinite where there is none.
        starts: ``[levels][n, layers + 1, places, states]``; cost of the stages behind so many
            layers, the first of them at a place.  The first state is that one of ``ways.meet``
            is still to be passed, the last that none need be.  Where the depth is open there is
            one level, else one for each stage.
        behind: likewise, the stage above them being at a place.
    """

    def __init__(
        self,
        chains: Chains,
        price: Floats,
        nic_prices: NicPrices | None,
        uplink_price: Floats | None,
    ) -> None:
        self.chains, self.price = chains, price
        self.ways = chains.ways or Ways.anywhere(len(price))
        self.hop = self.ways.hop(uplink_price)
        layers, depth, n = chains.layers, chains.depth, len(chains.first)
        self.rows = np.arange(n)[:, None]
        self.asks = None
        shared = np.zeros(len(price), dtype=bool)
        if chains.nics is not None and nic_prices is not None:
            shared[chains.nics.classes] = True
            self.asks = chains.nics.at(nic_prices)
        self.shared, self.private = np.flatnonzero(shared), np.flatnonzero(~shared)
        meet = self.ways.meet
        shape = n, layers + 1, len(meet), 1 if meet.all() else 2
        self.starts = [np.full(shape, np.inf) for _ in range(depth or 1)]
        self.behind = [np.full(shape, np.inf) for _ in range(depth or 1)]
        self.ended = np.full(shape, np.inf)
        self.ended[:, layers, :, -1] = 0.0
        for level in reversed(range(len(self.behind))):
            stage = level if depth else 1
            for above in range(layers - 1, 0, -1):
                if stage:
                    starts = self._least(stage, above)
                    self.starts[level][:, above] = starts
                    self.behind[level][:, above] = self._entered(starts)
        self.whole = self._least(0, 0)[:, :, 0]
        self.cost: Floats = self.whole.min(axis=1)

    def _entered(self, starts: Floats) -> Floats:
        """``[n, places, states]``; from the stage above, over the cheapest hop."""
        if self.hop is None:
            return starts
        found: Floats = (self.hop[..., None] + starts[:, None]).min(axis=2)
        return found

    def _options(self, stage: int) -> Iterator[tuple[StageKind, Floats]]:
        """Kinds that a stage may be of, and the costs behind it."""
        depth = self.chains.depth
        if depth is None or stage < depth - 1:
            yield "inner" if stage else "first", self.behind[stage + 1 if depth else 0]
        if depth is None or stage == depth - 1:
            yield "last" if stage else "only", self.ended

    def _least(self, stage: int, above: int) -> Floats:
        """``[n, places, states]``; lowest cost of a stage at a place and all behind it."""
        ways = self.ways
        least = np.full((len(self.rows), *self.ended.shape[2:]), np.inf)
        for kind, behind in self._options(stage):
            after = behind[:, above + 1 :]
            if len(self.private):
                place = ways.place[self.private]
                most = self.chains.most(kind, above)[:, self.private]
                best = np.minimum.accumulate(after, axis=1)
                taken = np.minimum(most, best.shape[1]) - 1  # -1 where it can take none
                cost = best[self.rows, taken, place]
                cost = np.where((most > 0)[:, :, None], cost, np.inf)
                _to_places(least, cost + self.price[self.private, None], place)
            if len(self.shared):
                cost = self._shared(kind, above, after).min(axis=1)
                _to_places(least, cost, ways.place[self.shared])
        least[:, ways.meet, 0] = least[:, ways.meet, -1]
        return least

    def _shared(self, kind: StageKind, above: int, after: Floats) -> Floats:
        """``[n, layers, shared classes, states]``; cost of a stage of so many layers, and on."""
        assert self.asks is not None  # there are shared classes
        here = self.asks.cost(kind, above, after.shape[1]) + self.price[self.shared]
        most = self.chains.most(kind, above)[:, None, self.shared]
        here[np.arange(1, after.shape[1] + 1)[:, None] > most] = np.inf
        found: Floats = here[..., None] + after[:, :, self.ways.place[self.shared]]
        return found

    def chain(self, question: int) -> Chain:
        """A chain of that cost; there must be one."""
        ways, q = self.ways, question
        classes: list[int] = []
        layers: list[int] = []
        above, state = 0, 0
        place = int(self.whole[q].argmin())
        while True:
            if ways.meet[place]:
                state = -1
            best: tuple[float, int, int, StageKind] = np.inf, 0, 0, "only"
            for kind, behind in self._options(len(classes)):
                after = behind[q, above + 1 :, place, state]
                count = np.arange(1, len(after) + 1)[:, None]
                here = np.flatnonzero(ways.place == place)
                cost = after[:, None] + self.price[here]
                if self.asks is not None:
                    asked = np.zeros((len(after), len(self.price)))
                    asked[:, self.shared] = self.asks.cost(kind, above, len(after), q)
                    cost = cost + asked[:, here]
                cost = np.where(count <= self.chains.most(kind, above)[q, here], cost, np.inf)
                k, c = np.unravel_index(cost.argmin(), cost.shape)
                if cost[k, c] < best[0]:
                    best = float(cost[k, c]), int(k) + 1, int(here[c]), kind
            classes.append(best[2])
            layers.append(best[1])
            above += best[1]
            if best[3] in ("last", "only"):
                return Chain(tuple(classes), tuple(layers))
            level = len(classes) if self.chains.depth else 0
            following = self.starts[level][q, above, :, state]
            if self.hop is not None:
                following = following + self.hop[q, place]
                place = int(following.argmin())


def _to_places(least: Floats, cost: Floats, place: Ints) -> None:
    """Lower ``least`` (``[n, places, states]``) to ``cost`` (``[n, classes, states]``)."""
    order = np.argsort(place, kind="stable")
    there, starts = np.unique(place[order], return_index=True)
    found = np.minimum.reduceat(cost[:, order], starts, axis=1)
    least[:, there] = np.minimum(least[:, there], found)
