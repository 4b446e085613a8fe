"""The cheapest chain of devices, if stages of one node share its NIC.

A chain is cut into *visits*: runs of consecutive stages on one node.  Only a visit's ends send over
the NIC, twice a microbatch each, and what its stages hold is summed over it::

    node a            node b         hops over NICs: one end of a's, two of b's, one of c's
    0-2 | 3-5 | 6-8   9-11 | 12-14   NIC a sums layers 0-8, and 3-8 of them when 6-8 ends ...

A longer visit sends less and sums more.  A stage's groups start before those of the stages above,
so that behind ``o`` layers of its own visit it has to leave time for ``o`` layers on the NIC, too.
How far ``r`` devices of a node get from each layer does not depend on prices; then::

    cost[l] = min over classes, r of  r devices + 2 ends + cost[up to as far as they get]
"""

from __future__ import annotations

import numpy as np

from ray_train_geo.planning.certify_chains import Chain, Chains, NicRoom
from ray_train_geo.planning.link_table import Floats, Ints

__all__ = ["VisitChains"]

_FAR = 1 << 20


class VisitChains:
    """Chains of visits, for each of ``n`` questions.

    Args:
        chains: what a device can take by all other limits; their depth does not count here.
        longest: ``[classes]``; stages that a visit can have.
        microbatches: ``[n]``; how often each end of a visit sends.
    """

    def __init__(self, chains: Chains, longest: Ints, microbatches: Ints) -> None:
        room = chains.room
        assert room is not None
        self.chains, self.microbatches = chains, microbatches
        self.longest = longest
        n = len(chains.first)
        self.rows = np.arange(n)[:, None, None]
        self.devices = np.arange(1, int(longest.max()) + 1)[None, :, None]
        self.reach: list[Ints] = []
        self.final: list[Ints] = []
        for start in range(chains.layers):
            reach, final = self._visits(start, room)
            self.reach.append(reach)
            self.final.append(final)

    def _visits(self, start: int, room: NicRoom) -> tuple[Ints, Ints]:
        """Of visits from layer ``start`` on.

        Returns:
            ``[n, devices, classes]``: the layer that so many devices get to at most; and
            ``[n, classes]``: how many devices get to the end.
        """
        chains, layers = self.chains, self.chains.layers
        before = np.arange(start, layers)
        behind = (before - start)[None, :, None]

        def most(table: Ints, limits: tuple[Floats, Floats]) -> Ints:
            left, taken = (limit[:, min(start, limit.shape[1] - 1) :] for limit in limits)
            left = left if start else left - room.first
            fits = np.floor((left - behind * room.per_layer) / taken * (1 + 1e-9) + 1e-9)
            given = table[:, min(start, table.shape[1] - 1) :]
            return np.clip(np.minimum(given, fits), 0, layers).astype(np.int64)

        inner, last = most(chains.inner, room.inner), most(chains.last, room.last)
        if start == 0:
            inner[:, 0] = chains.first
            last[:, 0] = chains.only
        to = np.minimum(before[None, :, None] + inner, layers)
        to = np.maximum.accumulate(to, axis=1)
        ends = last >= layers - before[None, :, None]
        first_end = np.where(ends.any(axis=1), start + ends.argmax(axis=1), _FAR)
        count = self.devices.shape[1]
        reach = np.empty((len(to), count, to.shape[2]), dtype=np.int64)
        final = np.full(first_end.shape, _FAR)
        here = np.full(first_end.shape, start)
        for r in range(count):
            allowed = r < self.longest
            final = np.where(allowed & (here >= first_end) & (final == _FAR), r + 1, final)
            at = np.minimum(here - start, to.shape[1] - 1)
            here = np.take_along_axis(to, at[:, None], axis=1)[:, 0]
            reach[:, r] = np.where(allowed, here, start)
        return reach, final

    def cheapest(self, price: Floats, end_price: Floats) -> CheapestVisits:
        """The cheapest chain for every question.

        Args:
            price: ``[classes]``; of one device.
            end_price: ``[classes]``; of what a microbatch takes of a NIC.
        """
        return CheapestVisits(self, price, end_price)


class CheapestVisits:
    """The dynamic program's table, and the chains that it stands for.

    Attributes:
        cost: ``[n]``; the lowest price of a chain, infinite where there is none.
    """

    def __init__(self, visits: VisitChains, price: Floats, end_price: Floats) -> None:
        self.visits, self.price = visits, price
        layers = visits.chains.layers
        self.an_end: Floats = visits.microbatches[:, None] * end_price
        self.behind: Floats = np.full((len(visits.microbatches), layers + 1), np.inf)
        for start in reversed(range(layers)):
            through, ending = self._options(start, slice(None))
            best = np.minimum(through.min(axis=1), ending)
            self.behind[:, start] = best.min(axis=1)
        self.cost: Floats = self.behind[:, 0]

    def _options(self, start: int, some: slice) -> tuple[Floats, Floats]:
        """``[n, devices, classes]`` and ``[n, classes]``: with visits behind, and without."""
        visits = self.visits
        reach, final = visits.reach[start][some], visits.final[start][some]
        an_end = self.an_end[some]
        behind = np.minimum.accumulate(self.behind[some, start + 1 :], axis=1)
        taken = reach - start - 1
        rest = behind[visits.rows[: len(reach)], np.maximum(taken, 0)]
        enters = an_end if start else 0.0 * an_end
        through = visits.devices * self.price + (an_end + enters)[:, None] + rest
        through = np.where(taken >= 0, through, np.inf)
        ending = np.where(final < _FAR, final * self.price + enters, np.inf)
        return through, ending

    def chain(self, question: int) -> Chain:
        """A chain of that cost; there must be one."""
        visits, start = self.visits, 0
        one = slice(question, question + 1)
        classes: list[int] = []
        ends: list[int] = []
        while True:
            through, ending = self._options(start, one)
            c = int(ending[0].argmin())
            if ending[0, c] <= through[0].min():
                classes += [c] * int(visits.final[start][question, c])
                ends += [c] if start else []
                each = int(visits.microbatches[question])
                sent = np.bincount(np.array(ends, dtype=np.int64), minlength=len(self.price))
                return Chain(tuple(classes), (), tuple((each * sent).tolist()))
            r, c = divmod(int(through[0].argmin()), through.shape[2])
            classes += [c] * (r + 1)
            ends += [c, c] if start else [c]
            reach = int(visits.reach[start][question, r, c])
            start += 1 + int(self.behind[question, start + 1 : reach + 1].argmin())
