"""How a step ends under local SGD: an island takes it alone, and the world hears of it later.

A step that waited for a word from the far side of the world would cost that round trip, however
rarely parameters are merged.  So an island applies its step as soon as its own ranks have their
gradients, and the sum over all workers - which, as ever, is what commits the step - has the whole
of the next one to come round::

    island 0   step 7 ─ apply ─ step 8 ─────────────── apply ─ step 9
                          │ vote 7    all have voted 7 ▲  │ vote 8
    rank 0                ▼────────────────────────────┘  ▼

Step 8 is applied only once step 7 is committed.  So no island is ever more than one step ahead of
what is committed, and the state before that one step is kept: if the sum never comes, because an
island was lost, all go back to the newest step for which somebody has it.  Nothing of a step that
not all have applied survives, and no sample is taken twice or left out by those who go on.

After step ``t`` the fragments that are due (``training.rounds``) send their pseudogradients, which
are merged as part of step ``t + delay_steps``.  Where state is saved, or a generation ends in good
order, everything is merged at once: all islands then hold the same parameters.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass, replace

import torch

from ray_train_geo.errors import DeadlineError
from ray_train_geo.observe.trace import Tracer
from ray_train_geo.planning.islands import Island
from ray_train_geo.spec_local_sgd import LocalSGDSpec
from ray_train_geo.training.assignment import Assignment
from ray_train_geo.training.commit import Commit
from ray_train_geo.training.memory import Memory, Snapshot
from ray_train_geo.training.optimizer import learning_rate
from ray_train_geo.training.outer import OuterState
from ray_train_geo.training.outer_sync import Learned, OuterBucket, OuterSync
from ray_train_geo.training.precision import LossScale
from ray_train_geo.training.previous import Previous
from ray_train_geo.training.rounds import due
from ray_train_geo.training.standing import Standing, StepRecord, Totals
from ray_train_geo.training.state import StageState
from ray_train_geo.training.stepping import REMEMBERED_RECORDS, VOTES, clipping, diverged
from ray_train_geo.transport.base import Transport

__all__ = ["LocalStepping"]

_ISLAND_SUMS = 2
"""Loss and squared norm."""


@dataclass(frozen=True, slots=True)
class _Flight:
    """Pseudogradients on the wire.

    Args:
        lands: the step that they are merged in.
    """

    lands: int
    learned: tuple[Learned, ...]
    means: Future[list[torch.Tensor]]


@dataclass(frozen=True, slots=True)
class _Voted:
    """A step that was applied here; whether it is committed is not known yet."""

    ballot: Commit
    record: StepRecord


class LocalStepping:
    """See :class:`~ray_train_geo.training.stepping.Stepping`.

    Args:
        began: the state's step and loss scale.
        island: the one of this worker.
        mates: the group of all ranks of the island; None if this is the only one.
        world: the group of all workers.
        buckets: of pseudogradients.
        committed: is told of each step.
    """

    def __init__(
        self,
        assignment: Assignment,
        spec: LocalSGDSpec,
        state: StageState,
        began: tuple[int, LossScale],
        island: Island,
        mates: Transport | None,
        world: Transport,
        buckets: Sequence[OuterBucket],
        sync: OuterSync,
        tracer: Tracer,
        committed: Callable[[StepRecord], None],
    ) -> None:
        assert state.outer is not None
        self.step, self.scale = began
        self._assignment = assignment
        self._spec = spec
        self._state = state
        self._outer: OuterState = state.outer
        self._island = island
        self._mates = None if mates is None else Commit(mates, _ISLAND_SUMS)
        # Two, in turns: the next step's votes may come before the last one's are counted.
        self._ballots = deque([Commit(world, VOTES), Commit(world, VOTES)])
        self._buckets = buckets
        self._sync = sync
        self._tracer = tracer
        self._committed = committed
        self._previous = Previous(state)
        self._flights: list[_Flight] = []
        self._voted: _Voted | None = None
        self._totals: Totals | None = None
        self._committed_step = self.step
        self._whole = True
        self._records: deque[StepRecord] = deque(maxlen=REMEMBERED_RECORDS)
        self._began_s = 0.0

    @property
    def loss_factor(self) -> float:
        return self.scale.factor / self._island.microbatches

    @property
    def computing(self) -> int:
        return self.step + 1

    def synchronized(self) -> None:
        """The last step's sums were complete before this step began."""

    def begin(self) -> None:
        self._began_s = time.perf_counter()
        if self._mates is not None:
            self._mates.begin()
        self._ballots[0].begin()

    # ------------------------------------------------------------------ a step's end

    def finish(self, complete: Callable[[], float], asked: tuple[bool, bool], last: bool) -> Totals:
        training, step, loss_sum = self._assignment.job.training, self.step + 1, complete()
        with self._tracer.span("optimizer", "commit", step):
            mine = [loss_sum, self._state.squared_norm(self._assignment.rank)]
            deadline_s = self._assignment.deadline_s
            sums = mine if self._mates is None else self._mates.agree(mine, deadline_s)
            before = self._count()
        norm, rate = math.sqrt(sums[1]), learning_rate(step, training)
        if not math.isfinite(norm):
            tokens = self._island.microbatches * training.microbatch * training.seq_len
            raise diverged(step, sums[0] / tokens, norm)
        last = last or before.stop or before.pause
        self._previous.keep(self.step, self.scale)
        self._whole = False
        with self._tracer.span("optimizer", "AdamW", step):
            self._state.apply(rate, clipping(norm, training) / self.scale.factor)
        self._outer.learned(self._island.microbatches * training.microbatch * training.seq_len)
        self._merge(step, everything=last)
        self.step, self._whole = step, True
        share = self._island.microbatches / training.total_microbatches
        self._vote([loss_sum, share * mine[1], *asked], rate)
        if not last:
            return before
        totals = self._count()
        return replace(totals, stop=totals.stop or before.stop, pause=totals.pause or before.pause)

    def _vote(self, mine: list[float], rate: float) -> None:
        ballot = self._ballots[0]
        self._ballots.rotate()
        ballot.give(mine)
        record = StepRecord(
            step=self.step,
            time=time.time(),
            loss=math.nan,  # known once all votes are counted
            grad_norm=math.nan,
            learning_rate=rate,
            loss_scale=self.scale.factor,
            skipped=False,
            step_s=time.perf_counter() - self._began_s,
        )
        self._voted = _Voted(ballot, record)

    def _count(self) -> Totals:
        """Wait until the newest step is committed, if it is not yet; its totals."""
        if self._voted is None:
            return Totals(0.0, 0.0)
        loss, squared_norm, stops, pauses = self._voted.ballot.sums(self._assignment.deadline_s)
        totals = Totals(loss, squared_norm, stops > 0, pauses > 0)
        self.settle(totals)
        self._committed(self._records[-1])
        return totals

    def settle(self, totals: Totals) -> None:
        assert self._voted is not None
        tokens = self._assignment.job.training.tokens_per_step
        record = replace(
            self._voted.record,
            loss=totals.loss_sum / tokens,
            grad_norm=math.sqrt(totals.squared_norm),
        )
        self._records.append(record)
        self._voted, self._totals, self._committed_step = None, totals, record.step

    # ------------------------------------------------------------------ merges

    def _merge(self, step: int, everything: bool) -> None:
        """What comes back in this step is merged, and what is due leaves.

        Args:
            everything: nothing may be on the wire afterwards, nor be learned and not merged.
        """
        while self._flights and (everything or self._flights[0].lands == step):
            self._land(self._flights.pop(0), self._spec.mix if self._spec.delay_steps else 0.0)
        fragments = range(self._spec.fragments) if everything else due(step, self._spec)
        learned = tuple(
            Learned(
                bucket,
                self._outer.pseudogradient(bucket.names),
                self._outer.tokens(bucket.names),
                f"{self._assignment.job.training.seed}/{step}/{index}",
            )
            for index, bucket in enumerate(self._buckets)
            if bucket.fragment in fragments
        )
        if not fragments:
            return
        flight = _Flight(step + self._spec.delay_steps, learned, self._sync.start(learned))
        if everything or flight.lands == step:
            self._land(flight, 0.0)
        else:
            self._flights.append(flight)

    def _land(self, flight: _Flight, mix: float) -> None:
        deadline_s = self._assignment.deadline_s
        with self._tracer.span("sync", "merge", self.step + 1):
            try:
                means = flight.means.result(deadline_s)
            except FutureTimeoutError:
                raise DeadlineError(
                    f"pseudogradients were not averaged within {deadline_s:.1f} s"
                ) from None
            spec = self._spec
            for learned, mean in zip(flight.learned, means, strict=True):
                self._outer.merge(
                    learned.bucket.names, mean, learned.tokens,
                    spec.outer_lr, spec.outer_momentum, mix,
                    learned.pseudogradient if spec.carry else None,
                )  # fmt: skip
            self._state.refresh()

    # ------------------------------------------------------------------ after the generation

    def live(self) -> Snapshot:
        return Snapshot(self.step, self._state.updates, self.scale, self._state.tensors())

    def standing(self, memory: Memory) -> Standing:
        previous = self._previous.snapshot()
        if self._whole:
            memory.hold(self.live())
            if previous is not None:
                memory.keep(previous)
        elif previous is not None:
            memory.hold(previous)  # the step that broke has changed the state in part
        applied = self.step if self._voted is not None else None
        return Standing(
            self._committed_step,
            applied,
            self._totals,
            tuple(self._records),
            memory.holdings(),
        )

    def close(self) -> None:
        self._sync.close()
