"""The cheapest chain of devices that holds the model, for many questions at once.

A chain is a pipeline whose devices are known by class only.  How many layers a device can take
depends on where in the chain it stands: behind ``l`` layers a microbatch arrives later, so less
time is left.  Dynamic programming from the last layer to the first, over the layers above::

    cost[l] = min over classes c, k <= most[l, c] of  price[c] + nic[l, k, c] + cost[l + k]

where ``nic`` is the price of what the stage asks of its node's NIC (`certify_nics`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ray_train_geo.planning.certify_nics import NicPrices, NicUse, StageKind
from ray_train_geo.planning.link_table import Floats, Ints

__all__ = ["Chain", "Chains", "Cheapest"]

_ALL = slice(None)


@dataclass(frozen=True, slots=True)
class Chain:
    """One cheapest chain: class and layers of each stage."""

    classes: tuple[int, ...]
    layers: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Chains:
    """How many layers a device can take, in each of ``n`` questions.

    Args:
        first: ``[n, classes]``; on a first stage that is not the last.
        inner, last: ``[n, layers or 1, classes]``; on an inner (the last) stage that stands
            behind that many layers.
        only: ``[n, classes]``; on a pipeline's only stage.
        depth: that many stages; None: any number.
        nics: what stages ask of their nodes' NICs; None: nothing.
    """

    layers: int
    first: Ints
    inner: Ints
    last: Ints
    only: Ints
    depth: int | None = None
    nics: NicUse | None = None

    def cheapest(self, price: Floats, nic_prices: NicPrices | None = None) -> Cheapest:
        """The cheapest chain for every question.

        Args:
            price: ``[classes]``; of one device.
            nic_prices: None: NICs are free.
        """
        return Cheapest(self, price, nic_prices)

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
        behind: ``[levels][n, layers + 1]``; cost of the stages behind so many layers.  Where the
            depth is open there is one level, else one for each stage.
    """

    def __init__(self, chains: Chains, price: Floats, nic_prices: NicPrices | None) -> None:
        self.chains, self.price = chains, price
        layers, depth, n = chains.layers, chains.depth, len(chains.first)
        self.asks = None
        shared = np.zeros(len(price), dtype=bool)
        if chains.nics is not None and nic_prices is not None:
            shared[chains.nics.classes] = True
            self.asks = chains.nics.at(nic_prices)
        self.shared, self.private = np.flatnonzero(shared), np.flatnonzero(~shared)
        self.behind = [np.full((n, layers + 1), np.inf) for _ in range(depth or 1)]
        for level in reversed(range(len(self.behind))):
            stage = level if depth else 1
            for above in range(layers - 1, 0, -1):
                if stage:
                    self.behind[level][:, above] = self._least(stage, above)
        self.cost: Floats = self._least(0, 0)

    def _options(self, stage: int, above: int) -> Iterator[tuple[StageKind, Floats]]:
        """Kinds that a stage may be of, and ``[n, layers left]``: cost behind it by its layers."""
        depth = self.chains.depth
        if depth is None or stage < depth - 1:
            behind = self.behind[stage + 1 if depth else 0][:, above + 1 :]
            yield "inner" if stage else "first", behind
        if depth is None or stage == depth - 1:
            behind = np.full((len(self.cost_rows), self.chains.layers - above), np.inf)
            behind[:, -1] = 0.0
            yield "last" if stage else "only", behind

    @property
    def cost_rows(self) -> Ints:
        return np.arange(len(self.chains.first))

    def _least(self, stage: int, above: int) -> Floats:
        """``[n]``; lowest cost of this stage and all behind it."""
        least = np.full(len(self.chains.first), np.inf)
        for kind, behind in self._options(stage, above):
            if len(self.private):
                most = self.chains.most(kind, above)[:, self.private]
                best = np.minimum.accumulate(behind, axis=1)
                taken = np.minimum(most, best.shape[1]) - 1  # -1 where it can take none
                cost = np.where(most > 0, best[self.cost_rows[:, None], taken], np.inf)
                least = np.minimum(least, (cost + self.price[self.private]).min(axis=1))
            if len(self.shared):
                cost = self._shared(kind, above, behind, _ALL)
                least = np.minimum(least, cost.min(axis=(1, 2)))
        return least

    def _shared(self, kind: StageKind, above: int, behind: Floats, questions: slice) -> Floats:
        """``[questions, layers, shared classes]``; cost of a stage of so many layers, and on."""
        assert self.asks is not None  # there are shared classes
        cost = self.asks.cost(kind, above, behind.shape[1], questions)
        cost += self.price[self.shared]
        cost += behind[questions, :, None]
        most = self.chains.most(kind, above)[questions][:, None, self.shared]
        cost[np.arange(1, behind.shape[1] + 1)[None, :, None] > most] = np.inf
        return cost

    def chain(self, question: int) -> Chain:
        """A chain of that cost; there must be one."""
        classes: list[int] = []
        layers: list[int] = []
        above, this = 0, slice(question, question + 1)
        while above < self.chains.layers:
            best: tuple[float, int, int] = np.inf, 0, 0
            for kind, behind in self._options(len(classes), above):
                count = np.arange(1, behind.shape[1] + 1)[:, None]
                most = self.chains.most(kind, above)[question, self.private]
                alone = behind[question][:, None] + self.price[self.private]
                costs = [(np.where(count <= most, alone, np.inf), self.private)]
                if len(self.shared):
                    costs.append((self._shared(kind, above, behind, this)[0], self.shared))
                for cost, numbers in costs:
                    if cost.size and cost.min() < best[0]:
                        k, c = np.unravel_index(cost.argmin(), cost.shape)
                        best = float(cost[k, c]), int(k) + 1, int(numbers[c])
            classes.append(best[2])
            layers.append(best[1])
            above += best[1]
        return Chain(tuple(classes), tuple(layers))
