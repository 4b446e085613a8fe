"""How a step ends when its sum may take until the end of the next one.

Gradients leave during a step's last backward and come back while the next step is computed; a
thread waits for them, and votes::

    compute   │ step 7 at w5 │ step 8 at w6 │ step 9 at w7 │
    wire               └─ g7, vote ───┐ └─ g8, vote ───┐
    apply                             w7               w8       w7 = AdamW(w6, g7)

So step ``t`` is computed at the parameters that the steps up to ``t - 2`` have made.  That is a
rule of what is computed, not of who was how fast: whoever takes step ``t`` again - after a failure,
or from a checkpoint - does so at those parameters, which are kept beside the newest ones for it
(``behind`` in :mod:`.state`), move with their layer, and are in checkpoints.  Where state is saved,
or a generation ends, the newest step is waited for; the next one is still computed at ``behind``.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import torch

from ray_train_geo.observe.trace import Tracer
from ray_train_geo.training.assignment import Assignment
from ray_train_geo.training.commit import Commit
from ray_train_geo.training.memory import Memory, Snapshot
from ray_train_geo.training.optimizer import learning_rate
from ray_train_geo.training.precision import LossScale
from ray_train_geo.training.standing import Standing, StepRecord, Totals
from ray_train_geo.training.state import StageState
from ray_train_geo.training.stepping import REMEMBERED_RECORDS, VOTES, clipping, diverged
from ray_train_geo.transport.base import Transport

__all__ = ["DelayedStepping"]


class _Summing:
    """A step whose gradients are being summed, in the idle buffers.

    Args:
        complete: waits for the sums; returns the loss here.
        computed: on a GPU, when its backwards are done.
    """

    def __init__(
        self,
        step: int,
        complete: Callable[[], float],
        asked: tuple[bool, bool],
        ballot: Commit,
        computed: torch.cuda.Event | None,
    ) -> None:
        self.step = step
        self.complete = complete
        self.asked = asked
        self.ballot = ballot
        self.computed = computed
        self.summed: Future[None] = Future()
        self.totals: Future[Totals] | None = None


class DelayedStepping:
    """See :class:`~ray_train_geo.training.stepping.Stepping`.

    Args:
        began: the state's step and loss scale.
        world: the group of all workers.
        committed: is told of each step.
        failed: is told of an error in the thread that sums: the one that computes must end, too.
    """

    def __init__(
        self,
        assignment: Assignment,
        state: StageState,
        began: tuple[int, LossScale],
        world: Transport,
        tracer: Tracer,
        committed: Callable[[StepRecord], None],
        failed: Callable[[BaseException], None],
    ) -> None:
        self.step, self.scale = began
        self._assignment = assignment
        self._state = state
        self._cuda = next((w.device for w in state.weights.values() if w.is_cuda), None)
        # Two, in turns: a step's receives are posted as it begins, before the last one's votes.
        self._ballots = deque([Commit(world, VOTES), Commit(world, VOTES)])
        self._tracer = tracer
        self._committed = committed
        self._failed = failed
        self._waiter = ThreadPoolExecutor(1, thread_name_prefix="delayed-sums")
        self._summing: _Summing | None = None
        self._prepared: int | None = None
        self._totals: Totals | None = None
        self._records: deque[StepRecord] = deque(maxlen=REMEMBERED_RECORDS)
        self._behind = False
        self._since_s = time.perf_counter()

    @property
    def computing(self) -> int:
        return self.step + (1 if self._summing is None else 2)

    @property
    def loss_factor(self) -> float:
        return self.scale.factor / self._assignment.job.training.total_microbatches

    def begin(self) -> None:
        self._ballots[0].begin()
        if self._summing is not None:
            self._start(self._summing)
            return
        self._since_s = time.perf_counter()
        self._state.swap_behind()
        self._behind = True

    def synchronized(self) -> None:
        """Wait for the last step's sums: those of this step come behind them.

        Raises:
            TransportError: they will never be complete.
        """
        if self._summing is not None:
            self._summing.summed.result()

    def finish(self, complete: Callable[[], float], asked: tuple[bool, bool], last: bool) -> Totals:
        before = self._apply()
        self._return_to_newest()
        self._state.swap_gradients()
        computed = None
        if self._cuda is not None:
            computed = torch.cuda.Event()
            computed.record(torch.cuda.current_stream(self._cuda))
        self._summing = _Summing(self.step + 1, complete, asked, self._ballots[0], computed)
        self._ballots.rotate()
        if not (last or before.stop or before.pause):
            return before
        totals = self._apply()
        return replace(totals, stop=totals.stop or before.stop, pause=totals.pause or before.pause)

    def _start(self, summing: _Summing) -> None:
        if summing.totals is None:
            summing.totals = self._waiter.submit(self._sum, summing)

    def _sum(self, summing: _Summing) -> Totals:
        """In a thread of its own: wait for the sums, and vote."""
        try:
            if summing.computed is None:
                return self._voted(summing)
            stream = torch.cuda.Stream(self._cuda)  # else it would wait for the next step, too
            with torch.cuda.stream(stream):
                summing.computed.wait(stream)
                return self._voted(summing)
        except BaseException as e:
            if not summing.summed.done():
                summing.summed.set_exception(e)
            self._failed(e)
            raise

    def _voted(self, summing: _Summing) -> Totals:
        loss = summing.complete()
        norm = self._state.squared_norm(self._assignment.rank, self._state.idle)
        if summing.computed is not None:
            torch.cuda.current_stream(self._cuda).synchronize()
        summing.summed.set_result(None)
        self._prepared = summing.step  # from here on others may commit, and this worker can follow
        sums = summing.ballot.agree([loss, norm, *summing.asked], self._assignment.deadline_s)
        return Totals(sums[0], sums[1], sums[2] > 0, sums[3] > 0)

    def _apply(self) -> Totals:
        """Wait until the step that is being summed is committed, and apply it."""
        if self._summing is None:
            return Totals(0.0, 0.0)
        with self._tracer.span("optimizer", "commit", self._summing.step):
            self._start(self._summing)
            assert self._summing.totals is not None
            totals = self._summing.totals.result()
        self._commit(totals)
        self._committed(self._records[-1])
        return totals

    def _commit(self, totals: Totals) -> None:
        """Apply the step whose gradients are in the idle buffers, alike everywhere."""
        training, step = self._assignment.job.training, self.step + 1
        norm, rate = math.sqrt(totals.squared_norm), learning_rate(step, training)
        if not math.isfinite(norm):
            raise diverged(step, totals.loss_sum / training.tokens_per_step, norm)
        self._state.swap_gradients()
        with self._tracer.span("optimizer", "AdamW", step):
            self._state.apply(rate, clipping(norm, training))
        self._state.swap_gradients()
        self.step, self._prepared, self._totals, self._summing = step, None, totals, None
        now_s = time.perf_counter()
        self._records.append(
            StepRecord(
                step=step,
                time=time.time(),
                loss=totals.loss_sum / training.tokens_per_step,
                grad_norm=norm,
                learning_rate=rate,
                loss_scale=self.scale.factor,
                skipped=False,
                step_s=now_s - self._since_s,
            )
        )
        self._since_s = now_s

    def _return_to_newest(self) -> None:
        if self._behind:
            self._state.swap_behind()
            self._behind = False

    # ------------------------------------------------------------------ after the generation

    def live(self) -> Snapshot:
        return Snapshot(self.step, self._state.updates, self.scale, self._state.tensors())

    def standing(self, memory: Memory) -> Standing:
        self._waiter.shutdown()  # what it waits for has been aborted
        self._return_to_newest()
        memory.hold(self.live())
        return Standing(
            self.step, self._prepared, self._totals, tuple(self._records), memory.holdings()
        )

    def settle(self, totals: Totals) -> None:
        assert self._prepared == self.step + 1
        self._commit(totals)

    def close(self) -> None:
        self._waiter.shutdown(wait=False)
