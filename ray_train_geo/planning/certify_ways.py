"""Where the stages of a pipeline may follow each other, and what the ways between cost.

A hop carries every microbatch of its pipeline, one at a time.  So a pipeline of ``m`` microbatches
takes no hop of more than ``T / m``; and where pairs of regions share an uplink, all pipelines'
messages have to pass it in ``T``.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from ray_train_geo.planning.link_table import Floats, Ints

__all__ = ["Bools", "Ways"]

Bools = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class Ways:
    """The hops between places that pipelines of ``n`` questions may take.

    Args:
        place: ``[classes]``; number of each class's place.
        meet: ``[places]``; every pipeline has a stage at one of these.
        open: ``[n, places, places]``; where a stage may follow another.
        uplink: ``[places, places]``; number of the uplink that a hop passes, or -1.
        uplink_s: ``[n, uplinks]``; for which all of a pipeline's messages over one hop pass it.
        left_s: in which all messages must have passed.
    """

    place: Ints
    meet: Bools
    open: Bools
    uplink: Ints
    uplink_s: Floats
    left_s: float

    @classmethod
    def anywhere(cls, classes: int) -> Ways:
        """All at one place."""
        none = np.empty((1, 0))
        place = np.zeros(classes, dtype=np.int64)
        every = np.ones((1, 1, 1), dtype=bool)
        return cls(place, every[0, 0], every, np.full((1, 1), -1), none, 0.0)

    def hop(self, price: Floats | None) -> Floats | None:
        """``[n, places, places]``; cost of a hop at a price of each uplink; None: nothing."""
        if self.open.all() and (price is None or not price.any()):
            return None if len(self.meet) == 1 else np.zeros(self.open.shape)
        cost = np.where(self.open, 0.0, np.inf)
        if price is not None and price.any():
            paid = np.append(self.uplink_s * price, np.zeros((len(self.uplink_s), 1)), axis=1)
            cost += paid[:, self.uplink]
        return cost

    def asked(self, classes: tuple[int, ...], question: int) -> Floats:
        """``[uplinks]``; seconds for which a chain's messages pass each."""
        found = np.zeros(self.uplink_s.shape[1])
        for a, b in pairwise(classes):
            uplink = self.uplink[self.place[a], self.place[b]]
            if uplink >= 0:
                found[uplink] += self.uplink_s[question, uplink]
        return found
