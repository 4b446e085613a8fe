"""Where workers stand when their generation has ended, and where they can go on together (pure).

The commit's all-reduce may complete on some workers and break on others::

    rank 0   step 7 ── gradients summed ── all-reduce ── committed 8        knows the totals
    rank 1   step 7 ── gradients summed ── all-re✕                          prepared 8
    rank 2   step 7 ── gradients summed ── killed

Its result exists only because every worker had put in its numbers, which each does only once its
summed gradients are complete.  So as soon as one survivor has committed step 8, the others can:
all they lack is the totals.  If none has, nobody ever will, and all replay it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from ray_train_geo.errors import WorkerError
from ray_train_geo.training.precision import LossScale

__all__ = [
    "Bequest",
    "Common",
    "Holding",
    "Standing",
    "StepRecord",
    "Totals",
    "common_state",
    "settlement",
]


@dataclass(frozen=True, slots=True)
class Totals:
    """What the commit's all-reduce returns, the same on every worker.

    Args:
        loss_sum: over all tokens of the step, in nats.
        squared_norm: of the summed gradients, still times the loss scale squared.
        stop, pause: somebody asked for it.
    """

    loss_sum: float
    squared_norm: float
    stop: bool = False
    pause: bool = False


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One committed step, the same on every worker but for ``time`` and ``step_s``.

    Args:
        loss: mean over all tokens of the step, in nats.
        grad_norm: global L2 norm before clipping; not finite if the step overflowed.
    """

    step: int
    time: float
    loss: float
    grad_norm: float
    learning_rate: float
    loss_scale: float
    skipped: bool
    step_s: float


@dataclass(frozen=True, slots=True)
class Holding:
    """State of one committed step that is in a worker's memory.

    Args:
        names: weights that it has, each with its moments.
        updates: AdamW updates so far.
        residuals: weights that it has a residual of its own for.
        spares: (weight, owner): copies of other workers' residuals.
    """

    step: int
    updates: int
    loss_scale: LossScale
    names: frozenset[str]
    residuals: frozenset[str] = frozenset()
    spares: frozenset[tuple[str, str]] = frozenset()


@dataclass(frozen=True, slots=True)
class Standing:
    """What a worker says of itself once its generation has ended.

    Args:
        step: last step that it committed; None if it has never trained.
        prepared: a later step whose summed gradients it has.
        totals: of ``step``, if it was committed in the generation that ended.
        records: of its last steps, ascending: reports may have died with rank 0.
        holdings: what it has in memory.
    """

    step: int | None
    prepared: int | None
    totals: Totals | None
    records: tuple[StepRecord, ...]
    holdings: tuple[Holding, ...]


def settlement(standings: Mapping[str, Standing]) -> tuple[int | None, Totals | None, list[str]]:
    """``(step, totals, behind)``: who must still commit ``step``, and with which totals.

    Raises:
        WorkerError: a worker can't follow; the protocol does not let that happen.
    """
    steps = {w: s.step for w, s in standings.items() if s.step is not None}
    if not steps:
        return None, None, []
    step = max(steps.values())
    totals = next((s.totals for s in standings.values() if s.step == step and s.totals), None)
    behind = sorted(w for w, at in steps.items() if at < step)
    for worker in behind:
        if standings[worker].prepared != step or totals is None:
            raise WorkerError(
                f"{worker} is at step {steps[worker]} and can't commit step {step}, which others "
                "have committed"
            )
    return step, totals, behind


class Bequest(NamedTuple):
    """A residual that somebody else is to take over.

    Args:
        giver: the worker that has it.
        owner: whose it was, if not the giver's own.
    """

    giver: str
    owner: str | None = None


@dataclass(frozen=True, slots=True)
class Common:
    """A step that all can go on from.

    Args:
        holders: of each weight, the workers that have it at this step.
        residuals: of each weight, the workers that have a residual for it.
        spares: of each weight, copies of residuals of workers that are gone: (owner, who has it).
    """

    step: int
    updates: int
    loss_scale: LossScale
    holders: Mapping[str, tuple[str, ...]]
    residuals: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    spares: Mapping[str, tuple[tuple[str, str], ...]] = field(default_factory=dict)

    def bequests(self, holders: Mapping[str, Sequence[str]]) -> dict[str, dict[str, list[Bequest]]]:
        """Who gets whose residuals: heir -> weight -> of workers that give it up, or are gone.

        Who keeps a weight keeps its residual.  Heirs are those that come, before those that have
        one of their own: whoever takes a lost worker's place goes on with its residual.

        Args:
            holders: of each weight, the workers that will hold it.
        """
        found: dict[str, dict[str, list[Bequest]]] = {}
        for name in sorted({*self.residuals, *self.spares}):
            having = self.residuals.get(name, ())
            heirs = sorted(holders[name], key=lambda worker: worker in having)
            left = [Bequest(worker) for worker in having if worker not in heirs]
            left += [Bequest(keeper, owner) for owner, keeper in self.spares.get(name, ())]
            for i, bequest in enumerate(left):
                heir = heirs[i % len(heirs)]
                found.setdefault(heir, {}).setdefault(name, []).append(bequest)
        return found


def common_state(
    standings: Mapping[str, Standing], names: Collection[str], committed: int | None = None
) -> Common | None:
    """The newest step at which the workers together hold all weights ``names``, if any.

    Args:
        committed: the newest committed step; by default, as far as the workers know.  Under local
            SGD some may hold the step after it: that does not count.
    """
    if committed is None:
        known = [s.step for s in standings.values() if s.step is not None]
        committed = max(known, default=None)
    limit = math.inf if committed is None else committed
    steps = {h.step for s in standings.values() for h in s.holdings if h.step <= limit}
    for step in sorted(steps, reverse=True):
        found = [
            (worker, holding)
            for worker, standing in sorted(standings.items())
            for holding in standing.holdings
            if holding.step == step
        ]
        holders = {n: tuple(dict.fromkeys(w for w, h in found if n in h.names)) for n in names}
        if all(holders.values()):
            first = found[0][1]
            residuals = {
                n: tuple(dict.fromkeys(w for w, h in found if n in h.residuals)) for n in names
            }
            left = {n: workers for n, workers in residuals.items() if workers}
            spares: dict[str, dict[str, str]] = {}
            for worker, holding in found:
                for name, owner in sorted(holding.spares):
                    if name in residuals and owner not in residuals[name]:
                        spares.setdefault(name, {}).setdefault(owner, worker)
            gone = {name: tuple(owners.items()) for name, owners in spares.items()}
            return Common(step, first.updates, first.loss_scale, holders, left, gone)
    return None
