"""A placement problem under DT-FM's cost, with devices counted by class.

A group is a sorted tuple of classes, one for each of its devices: ``(0, 0, 3)`` is two devices of
class 0 and one of class 3.  Twins make groups of the same classes cost the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from ray_train_geo.planning.device_classes import DeviceClasses
from ray_train_geo.planning.dtfm import PairCosts
from ray_train_geo.planning.dtfm_matching import bottleneck_flow, bottleneck_matching
from ray_train_geo.planning.dtfm_order import shortest_path

__all__ = ["ClassProblem", "Group"]

Floats = NDArray[np.float64]
Group = tuple[int, ...]

_MOST_MATCHED = 64
"""Devices of a group that are matched one by one; of more, a flow between classes is faster."""


@dataclass(frozen=True, eq=False)
class ClassProblem:
    """Choose ``stages`` groups of ``replicas`` devices, and their order.

    Args:
        sizes: ``[classes]``; devices in each.
        sync_s, hop_s: ``[classes, classes]``, symmetric; between two devices of these classes,
            there and back, in seconds.  A class of one device has 0 with itself.
    """

    stages: int
    replicas: int
    sizes: tuple[int, ...]
    sync_s: Floats
    hop_s: Floats
    _sync: dict[Group, float] = field(default_factory=dict)
    _hop: dict[tuple[Group, Group], float] = field(default_factory=dict)

    @classmethod
    def of(
        cls, costs: PairCosts, classes: DeviceClasses, stages: int, replicas: int
    ) -> ClassProblem:
        """The problem of all devices of ``costs``."""
        first = np.array([devices[0] for devices in classes.members])
        last = np.array([devices[-1] for devices in classes.members])
        sync_s = costs.sync_s(first[:, None], last[None, :])
        hop_s = costs.hop_s(first[:, None], last[None, :])
        single = first == last
        sync_s[single, single] = hop_s[single, single] = 0.0
        sizes = tuple(len(devices) for devices in classes.members)
        return cls(stages, replicas, sizes, sync_s, hop_s)

    @property
    def usable(self) -> NDArray[np.bool_]:
        """``[classes, classes]``; whether two devices of these classes exist."""
        pairs = np.ones(self.hop_s.shape, dtype=bool)
        np.fill_diagonal(pairs, np.array(self.sizes) > 1)
        return pairs

    @cached_property
    def orbits(self) -> tuple[tuple[int, ...], ...]:
        """Classes that can take each other's place: of one size, and alike to all others."""
        orbits: list[list[int]] = []
        for c in range(len(self.sizes)):
            orbit = next((o for o in orbits if self._exchangeable(o[0], c)), None)
            if orbit is None:
                orbits.append([c])
            else:
                orbit.append(c)
        return tuple(map(tuple, orbits))

    def data_parallel_s(self, group: Group) -> float:
        """What the slowest device of ``group`` takes to exchange gradients with the others."""
        found = self._sync.get(group)
        if found is None:
            classes = np.array(group)
            pairs = self.sync_s[classes[:, None], classes[None, :]]
            found = float((pairs.sum(axis=1) - np.diag(pairs)).max())
            self._sync[group] = found
        return found

    def bottleneck_s(self, a: Group, b: Group) -> float:
        """The slowest pair of the best matching between two groups."""
        key = (a, b) if a <= b else (b, a)
        found = self._hop.get(key)
        if found is None:
            if len(a) <= _MOST_MATCHED:
                found = bottleneck_matching(self.hop_s[np.ix_(a, b)])[0]
            else:
                rows, columns = Counter(a), Counter(b)
                weights = self.hop_s[np.ix_(list(rows), list(columns))]
                found = bottleneck_flow(weights, list(rows.values()), list(columns.values()))
            self._hop[key] = found
        return found

    def cost_s(self, groups: Sequence[Group]) -> float:
        """DT-FM's cost of ``groups`` in this order."""
        return max(map(self.data_parallel_s, groups)) + sum(
            self.bottleneck_s(a, b) for a, b in pairwise(groups)
        )

    def ordered(self, groups: Sequence[Group]) -> tuple[Group, ...]:
        """The same groups along their shortest path."""
        hops = np.array([[self.bottleneck_s(a, b) for b in groups] for a in groups])
        np.fill_diagonal(hops, 0.0)
        return tuple(groups[i] for i in shortest_path(hops))

    def forget(self, most: int) -> None:
        """Drop remembered costs where there are more than ``most``, so that memory stays flat."""
        for remembered in (self._sync, self._hop):
            if len(remembered) > most:
                remembered.clear()

    def least_data_parallel_s(self) -> float:
        """What no group can beat: each device's cheapest partners, of all devices there are."""
        return float(min(self._cheapest_partners_s(c) for c in range(len(self.sizes))))

    def least_hop_s(self) -> float:
        """What no hop can beat."""
        return float(self.hop_s[self.usable].min()) if self.stages > 1 else 0.0

    def merged(self, label: Sequence[int]) -> ClassProblem:
        """A relaxation: classes of equal ``label`` as one, any pair at its label's least cost."""
        labels = np.array(label)
        count = int(labels.max()) + 1
        sync_s, hop_s = np.full((2, count, count), np.inf)
        usable = self.usable
        a, b = np.nonzero(usable)
        np.minimum.at(sync_s, (labels[a], labels[b]), self.sync_s[usable])
        np.minimum.at(hop_s, (labels[a], labels[b]), self.hop_s[usable])
        sizes = np.bincount(labels, weights=self.sizes, minlength=count).astype(int)
        single = sizes == 1
        sync_s[single, single] = hop_s[single, single] = 0.0
        return ClassProblem(self.stages, self.replicas, tuple(map(int, sizes)), sync_s, hop_s)

    def _exchangeable(self, c: int, d: int) -> bool:
        others = [x for x in range(len(self.sizes)) if x not in (c, d)]
        return self.sizes[c] == self.sizes[d] and all(
            costs[c, c] == costs[d, d] and np.array_equal(costs[c, others], costs[d, others])
            for costs in (self.sync_s, self.hop_s)
        )

    def _cheapest_partners_s(self, c: int) -> float:
        wanted, total_s = self.replicas - 1, 0.0
        for d in np.argsort(self.sync_s[c], kind="stable"):
            taken = min(wanted, self.sizes[d] - (d == c))
            total_s += taken * float(self.sync_s[c, d])
            wanted -= taken
        return total_s
