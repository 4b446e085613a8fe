"""What migration adds to the objective, and how to have less of it.

A move is worth its time only if what it gains lasts.  With ``m`` seconds of migration, the
objective ``v`` (per step, or per token) and ``T`` seconds until the next change is expected, a plan
makes progress ``T / v`` in ``T + m`` seconds (and, if the plan in force trains on meanwhile at
``v0``, ``m / v0`` more), so what is minimised is

    v * (T + m) / (T + m * v / v0),     v0 infinite if nothing trains meanwhile: v * (1 + m / T)

Parcae's *liveput* (Duan et al., NSDI 2024) is such a throughput, net of migration; here layers
move over links of known speed, so that ``m`` is a prediction, not a constant.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import linear_sum_assignment

from ray_train_geo.planning.evaluate import Candidate, Chain, Evaluation, Evaluator
from ray_train_geo.planning.pipeline_cost import PipelineCost
from ray_train_geo.planning.problem import Problem
from ray_train_geo.planning.transition import Holdings, Layers, Transition
from ray_train_geo.spec import GradientSyncName

__all__ = ["Horizon", "MigrationEvaluator", "with_least_moves"]


@dataclass(frozen=True, slots=True)
class Horizon:
    """By when the next change is expected, and what trains while layers move.

    Args:
        expected_s: from the end of the migration to the next change; may be infinite.
        meanwhile: the objective of the plan that trains on while layers move; None if none does.
    """

    expected_s: float
    meanwhile: float | None = None

    def value(self, value: float, migration_s: float) -> float:
        """The objective with its share of the migration (the formula of this module)."""
        share = migration_s / self.expected_s
        trained_on = 0.0 if self.meanwhile is None else share * value / self.meanwhile
        return value * (1 + share) / (1 + trained_on)


class MigrationEvaluator(Evaluator):
    """An evaluator whose values include migration.  Pipelines that stay keep cut and codecs.

    Args:
        kept: the pipelines that could stay as they are.
        most_layers: that may move for each change; None is any number.  A plan changes by as many
            devices as left, or as it takes in, whichever are more (and once at least).
        left: how many devices left.
    """

    def __init__(
        self,
        problem: Problem,
        holdings: Holdings,
        horizon: Horizon,
        kept: Sequence[Chain] = (),
        most_layers: int | None = None,
        left: int = 0,
    ) -> None:
        super().__init__(problem)
        self.considered = 0
        self._holdings = holdings
        self._horizon = horizon
        self._kept = {chain.devices: chain for chain in kept}
        self._most_layers, self._left = most_layers, left

    def pipeline(self, chain: Chain, pipelines: int, microbatches: int) -> PipelineCost | None:
        """As :class:`Evaluator`; an open cut is first taken to be the one in force."""
        if chain.cut is None and chain.devices in self._kept:
            found = super().pipeline(self._kept[chain.devices], pipelines, microbatches)
            if found is not None:
                return found
        return super().pipeline(chain, pipelines, microbatches)

    def __call__(
        self,
        candidate: Candidate,
        modes: Sequence[GradientSyncName] | None = None,
        microbatches: Sequence[int] | None = None,
    ) -> Evaluation | None:
        """As :class:`Evaluator`; None also where more layers would move than allowed."""
        self.considered += 1
        found = super().__call__(candidate, modes, microbatches)
        if found is None:
            return None
        moved = self._moves(found)
        if self._most_layers is not None:
            devices = self.problem.topology.devices
            used = (devices[d].id for p in found.pipelines for d in p.devices)
            taken_in = sum(self._holdings.layers(d) is None for d in used)
            if moved.layers_moved > self._most_layers * max(1, self._left, taken_in):
                return None
        return replace(found, value=self._horizon.value(found.value, moved.seconds))

    def _moves(self, found: Evaluation) -> Transition:
        devices = self.problem.topology.devices
        return self._holdings.moves_to(
            {
                devices[d].id: (p.cut[s], p.cut[s + 1])
                for p in found.pipelines
                for s, d in enumerate(p.devices)
            }
        )


def with_least_moves(
    candidate: Candidate, problem: Problem, held: Mapping[int, Layers]
) -> Candidate:
    """``candidate`` (its cuts fixed) with twins exchanged so that most layers stay where they are.

    Twins cost the same wherever they stand, so this is an assignment problem for each set of them.

    Args:
        held: by device number, the layers that it holds now.
    """
    chains = [list(chain.devices) for chain in candidate]
    places: dict[int, list[tuple[int, int]]] = {}
    twin = problem.twins
    for p, chain in enumerate(chains):
        for s, device in enumerate(chain):
            places.setdefault(twin[device], []).append((p, s))
    used = {d for chain in chains for d in chain}
    for number, positions in places.items():
        free = [d for d in sorted(held) if twin[d] == number and d not in used]
        able = [chains[p][s] for p, s in positions] + free
        stay = np.zeros((len(positions), len(able)))
        for i, (p, s) in enumerate(positions):
            cut = candidate[p].cut
            assert cut is not None  # its cuts are fixed
            for j, device in enumerate(able):
                first, end = held.get(device, (0, 0))
                stay[i, j] = max(0, min(end, cut[s + 1]) - max(first, cut[s]))
        rows, columns = linear_sum_assignment(stay, maximize=True)
        for (p, s), j in zip(positions, columns[np.argsort(rows)].tolist(), strict=True):
            chains[p][s] = able[j]
    return tuple(
        replace(chain, devices=tuple(devices))
        for chain, devices in zip(candidate, chains, strict=True)
    )
