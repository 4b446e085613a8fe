"""How a step ends: one small sum over all workers, and AdamW everywhere or nowhere.

The sum is the commit point.  It can complete only when every worker has its reduced gradients,
and what it returns (norm, overflow, whether to stop) is the same for all, so all of them clip
alike, skip alike, and stop after the same step.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

from ray_train_geo.errors import DivergedError
from ray_train_geo.observe.trace import Tracer
from ray_train_geo.spec import TrainingSpec
from ray_train_geo.training.assignment import Assignment
from ray_train_geo.training.commit import Commit
from ray_train_geo.training.memory import Memory, Snapshot
from ray_train_geo.training.optimizer import learning_rate
from ray_train_geo.training.precision import LossScale
from ray_train_geo.training.standing import Standing, StepRecord, Totals
from ray_train_geo.training.state import StageState
from ray_train_geo.transport.base import Transport

__all__ = ["REMEMBERED_RECORDS", "VOTES", "Stepping", "Synchronous", "clipping", "diverged"]

VOTES = 4
"""What is summed at the end of a step: loss, squared norm, and who wants to stop or to pause."""

_SMALLEST_LOSS_SCALE = 2.0**-20
REMEMBERED_RECORDS = 4096
"""Those whose reports may be lost: rank 0 may die while the coordinator is being replaced."""


class Stepping(Protocol):
    """What a runtime asks of whatever decides how its steps end.

    Attributes:
        step: the last one that was applied here.
        scale: of the loss, in the next step.
        loss_factor: what a microbatch's mean loss is multiplied by before its backward.
    """

    step: int
    scale: LossScale

    @property
    def loss_factor(self) -> float: ...

    @property
    def computing(self) -> int:
        """The step that begins next, or has begun."""

    def begin(self) -> None:
        """The next step begins."""

    def synchronized(self) -> None:
        """The step's first gradients are about to be summed."""

    def finish(self, complete: Callable[[], float], asked: tuple[bool, bool], last: bool) -> Totals:
        """The step's last backward has ended here: apply it, or raise.

        Args:
            complete: waits until the gradients are summed, and returns the loss: over the tokens
                that this worker has computed it of, in nats.
            asked: whether somebody here asks to stop, to pause.
            last: nothing may be left open: state is saved, or the run ends.

        Returns:
            The newest totals; who reads "stop" or "pause" in them runs no further step.
        """

    def live(self) -> Snapshot:
        """The state itself, as it is now."""

    def standing(self, memory: Memory) -> Standing:
        """Where this worker stands, now that its generation has ended."""

    def settle(self, totals: Totals) -> None:
        """Others have committed the step that is prepared here, with these totals."""

    def close(self) -> None:
        """Give up what a generation that has ended may leave."""


class Synchronous:
    """Every step is applied once it is committed.

    Args:
        world: the group of all workers.
        committed: is told of each step.
        began: the state's step and loss scale.
    """

    def __init__(
        self,
        assignment: Assignment,
        state: StageState,
        began: tuple[int, LossScale],
        world: Transport,
        tracer: Tracer,
        committed: Callable[[StepRecord], None],
    ) -> None:
        self.step, self.scale = began
        self._assignment = assignment
        self._state = state
        self._ballot = Commit(world, VOTES)
        self._tracer = tracer
        self._committed = committed
        self._records: deque[StepRecord] = deque(maxlen=REMEMBERED_RECORDS)
        self._began_s = 0.0
        self._prepared: int | None = None
        self._totals: Totals | None = None

    @property
    def loss_factor(self) -> float:
        # Of the mean loss of the step, as the field does it: a microbatch's part is small, which
        # leaves fp16 headroom.
        return self.scale.factor / self._assignment.job.training.total_microbatches

    @property
    def computing(self) -> int:
        return self.step + 1

    def begin(self) -> None:
        self._began_s = time.perf_counter()
        self._ballot.begin()

    def synchronized(self) -> None:
        """The last step's sums were complete before this step began."""

    def finish(self, complete: Callable[[], float], asked: tuple[bool, bool], last: bool) -> Totals:
        step, loss_sum = self.step + 1, complete()
        with self._tracer.span("optimizer", "commit", step):
            norm = self._state.squared_norm(self._assignment.rank)
            self._prepared = step  # from here on others may commit, and this worker can follow
            loss, squared_norm, stops, pauses = self._ballot.agree(
                [loss_sum, norm, *asked], self._assignment.deadline_s
            )
        totals = Totals(loss, squared_norm, stops > 0, pauses > 0)
        self._committed(self._commit(totals))
        return totals

    def _commit(self, totals: Totals) -> StepRecord:
        """Apply the next step: from its totals and the summed gradients, alike everywhere."""
        training, step = self._assignment.job.training, self.step + 1
        unscale, scale = 1.0 / self.scale.factor, self.scale
        norm, rate = math.sqrt(totals.squared_norm) * unscale, learning_rate(step, training)
        overflow = not math.isfinite(norm)
        if overflow and training.precision != "fp16":
            raise diverged(step, totals.loss_sum / training.tokens_per_step, norm)
        if not overflow:
            with self._tracer.span("optimizer", "AdamW", step):
                self._state.apply(rate, unscale * clipping(norm, training))
        self.scale = scale.after(overflow, training.precision, training.loss_scale)
        if self.scale.factor < _SMALLEST_LOSS_SCALE:
            raise DivergedError(f"step {step}: gradients overflow at every loss scale")
        self.step, self._prepared, self._totals = step, None, totals
        record = StepRecord(
            step=step,
            time=time.time(),
            loss=totals.loss_sum / training.tokens_per_step,
            grad_norm=norm,
            learning_rate=rate,
            loss_scale=scale.factor,
            skipped=overflow,
            step_s=time.perf_counter() - self._began_s,
        )
        self._records.append(record)
        return record

    def live(self) -> Snapshot:
        return Snapshot(self.step, self._state.updates, self.scale, self._state.tensors())

    def standing(self, memory: Memory) -> Standing:
        memory.hold(self.live())
        return Standing(
            self.step, self._prepared, self._totals, tuple(self._records), memory.holdings()
        )

    def settle(self, totals: Totals) -> None:
        """Commit the prepared step.

        Raises:
            DivergedError: as those did who have committed it.
        """
        assert self._prepared == self.step + 1
        self._commit(totals)

    def close(self) -> None:
        """It has nothing of its own."""


def clipping(norm: float, training: TrainingSpec) -> float:
    """What a gradient of this L2 norm is multiplied by."""
    return min(1.0, training.grad_clip / (norm + 1e-6)) if training.grad_clip else 1.0


def diverged(step: int, loss: float, norm: float) -> DivergedError:
    """The error of a step whose gradients are not finite."""
    return DivergedError(
        f"step {step}: loss {loss:g}, gradient norm {norm:g}; nothing of this step was applied. "
        "Lower training.lr, or resume from an earlier checkpoint"
    )
