"""One worker's whole part of a generation: join, load, and run steps.  It knows nothing of Ray.

step k:   forward/backward of all microbatches          executor
          gradients summed over each layer's holders    gradient_sync, overlapped
          one small sum over all workers, AdamW:        stepping
          everywhere, or nowhere
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch

from ray_train_geo.codecs.workspace import Workspace
from ray_train_geo.errors import AbortedError
from ray_train_geo.observe.phases import PhasePage
from ray_train_geo.observe.trace import Tracer
from ray_train_geo.planning.islands import islands
from ray_train_geo.schedule.actions import Action
from ray_train_geo.schedule.make import make_schedule
from ray_train_geo.training.assignment import Assignment, Outcome, Reporter, Start, StepRecord
from ray_train_geo.training.batches import BatchSource
from ray_train_geo.training.copies import Copier
from ray_train_geo.training.delayed_stepping import DelayedStepping
from ray_train_geo.training.edges import make_edges
from ray_train_geo.training.executor import Batches, StageExecutor, at_full_speed
from ray_train_geo.training.gauge import Gauge, Observed
from ray_train_geo.training.gradient_sync import GradientSync
from ray_train_geo.training.groups import WORLD, group_name
from ray_train_geo.training.inheritance import inherit
from ray_train_geo.training.links import Links
from ray_train_geo.training.local_stepping import LocalStepping
from ray_train_geo.training.memory import Memory, Snapshot
from ray_train_geo.training.outer_sync import OuterSync, outer_buckets
from ray_train_geo.training.precision import LossScale
from ray_train_geo.training.residuals import RESIDUAL, spare_name
from ray_train_geo.training.saver import Saver
from ray_train_geo.training.standing import Standing, Totals
from ray_train_geo.training.stepping import Stepping, Synchronous
from ray_train_geo.training.sums import gradient_sums
from ray_train_geo.transport.state_stream import Streams
from ray_train_geo.transport.tcp_meter import TcpMeter

__all__ = ["StageRuntime"]


class StageRuntime:
    """A worker in one generation.  Methods but ``interrupt`` and ``abort`` are for one thread.

    Args:
        links: of this generation; they may have been joined ahead.
        device: what the stage computes on.
        reporter: is told what happens.
        memory: the worker's, with what earlier generations left in it.
        source: the worker's data, opened at most once.
        phases: is told what the worker does.
    """

    def __init__(
        self,
        assignment: Assignment,
        links: Links,
        device: torch.device,
        reporter: Reporter,
        memory: Memory | None = None,
        source: BatchSource | None = None,
        phases: PhasePage | None = None,
    ) -> None:
        self.assignment = assignment
        self.device = device
        self.memory = memory or Memory()
        self.fetch_s = 0.0
        self._links = links
        self._streams = Streams(assignment.generation, assignment.deadline_s)
        self._reporter = reporter
        self._source = source or BatchSource()
        self._stopping, self._pausing = threading.Event(), threading.Event()
        self._aborted = threading.Event()
        self._phases = phases
        self._tracer = Tracer(enabled=False, phases=phases)
        self._workspace = Workspace(device)
        self._meter = TcpMeter()
        self._gauge: Gauge | None = None
        self._copier: Copier | None = None
        self._saver: Saver | None = None
        self._forget_arrivals: Callable[[], None] = lambda: None
        self._trains = False
        self._steps: Stepping | None = None
        self._failure: BaseException | None = None

    # ------------------------------------------------------------------ getting ready

    def build(self) -> None:
        """Build the stage, get its state, and join all groups.

        Raises:
            DataError, CheckpointError: the input can't be used on this node.
            TransportError: a peer did not come, or does not have what it should.
        """
        a = self.assignment
        if self._phases is not None:
            self._phases.enter("recovery")
        self.memory.enter(a.generation)
        plan, role, training = a.plan, a.role, a.job.training
        pipeline = plan.pipelines[role.pipeline]
        first, last = plan.stage(role).layers
        ends = first == 0 or last == plan.layers
        batches = self._source.batches(a, self.device) if ends else _no_batches
        began = inherit(a, self.device, self.memory, self._streams)
        self._state, self.fetch_s = began.state, began.seconds
        if training.compile:
            for layer in self._state.module.layers.values():
                layer.compile()
        buckets = self._state.buckets
        self._links.join()
        transports = self._links.transports
        groups = {
            bucket.holders: transports[group_name("sync", bucket.holders)]
            for bucket in buckets
            if len(bucket.holders) > 1
        }
        delayed = bool(a.job.parallelism.delay_steps)  # then a thread of its own sums
        workspace = Workspace(self.device) if delayed else self._workspace
        sums = gradient_sums(a.job, plan, self._state, groups, workspace)
        self._sync = GradientSync(buckets, groups, sums, self._tracer)
        self._steps = self._stepping((began.step, began.loss_scale))
        self._count_arrivals()
        slow = self._links.emulation
        pace = at_full_speed if slow is None else slow.pace(self._state.module, a)
        actions = self._actions()
        self._gauge = Gauge(self.device, pace, {action.kind for action in actions})
        self._executor = StageExecutor(
            module=self._state.module,
            actions=actions,
            first_microbatch=pipeline.first_microbatch,
            batches=self._abortable(batches),
            edges=make_edges(a, transports, self._workspace, self._tracer),
            seed=training.seed,
            tracer=self._tracer,
            before_last_gradients=self._begin_arrivals,
            pace=self._gauge,
        )
        saved = began.step if isinstance(a.start, Start) and not a.start.weights_only else None
        self._saver = Saver(a, self._state, self._reporter, saved, self._phases)
        self._copier = Copier(
            a.copies, a.copies_to, self._streams, self.memory, self._copied_state, a.deadline_s,
            a.spares_to, self._copied_residuals,
        )  # fmt: skip

    def _stepping(self, began: tuple[int, LossScale]) -> Stepping:
        a, state, spec = self.assignment, self._state, self.assignment.job.local_sgd
        transports, tracer = self._links.transports, self._tracer
        world = transports[WORLD]
        committed = self._reporter.committed if a.rank == 0 else _untold
        if a.job.parallelism.delay_steps:
            return DelayedStepping(a, state, began, world, tracer, committed, self._failed)
        if spec is None or a.island is None:
            return Synchronous(a, state, began, world, tracer, committed)
        sizes = {name: weight.numel() for name, weight in state.weights.items()}
        limit = a.job.parallelism.bucket_bytes
        buckets = outer_buckets(sizes, a.plan, a.dims, spec.fragments, limit)
        merging = {
            bucket.holders: transports[group_name("merge", bucket.holders)]
            for bucket in buckets
            if len(bucket.holders) > 1
        }
        sync = OuterSync(a.rank, islands(a.plan, spec.across), merging, spec.codec, a.deadline_s)
        mates = transports.get(group_name("island", a.island.ranks))
        return LocalStepping(
            a, spec, state, began, a.island, mates, world, buckets, sync, tracer, committed
        )

    def _abortable(self, batches: Batches) -> Batches:
        """A stage that hears from no neighbour for long learns of an abort as it asks for data."""

        def checked(step: int, microbatch: int) -> tuple[torch.Tensor, torch.Tensor]:
            if self._aborted.is_set():
                raise AbortedError("the generation was aborted")
            return batches(step, microbatch)

        return checked

    # ------------------------------------------------------------------ state

    @property
    def step(self) -> int:
        """The last one that was applied here."""
        return 0 if self._steps is None else self._steps.step

    def _copied_state(self) -> Snapshot:
        assert self._steps is not None
        return self.memory.copied(self._steps.live())

    def _copied_residuals(self) -> Snapshot:
        assert self._steps is not None
        residuals, owner = self._state.residuals, self.assignment.device
        copies = {
            spare_name(name.removeprefix(RESIDUAL), owner): t.to("cpu", copy=True)
            for name, t in ({} if residuals is None else residuals.tensors()).items()
        }
        return Snapshot(self._steps.step, self._state.updates, self._steps.scale, copies)

    # ------------------------------------------------------------------ schedule

    def _actions(self) -> list[Action]:
        a = self.assignment
        pipeline = a.plan.pipelines[a.role.pipeline]
        warmup = [s.warmup for s in pipeline.stages]
        deferred = [s.deferred for s in pipeline.stages]
        stages = make_schedule(a.plan.schedule, warmup, deferred, pipeline.microbatches)
        return stages[a.role.stage]

    def _count_arrivals(self) -> None:
        """While the step's last gradients come, tell the sync of each bucket that is complete."""
        bucket_of = {n: i for i, b in enumerate(self._state.buckets) for n in b.names}
        self._missing: list[int] | None = None

        def arrived(name: str) -> None:
            if self._missing is not None:
                index = bucket_of[name]
                self._missing[index] -= 1
                if not self._missing[index]:
                    self._sync.ready(index)

        self._forget_arrivals = self._state.on_gradient(arrived)

    def _begin_arrivals(self) -> None:
        assert self._steps is not None
        self._steps.synchronized()
        self._sync.begin(self._steps.computing, self._steps.scale.factor)
        self._missing = [len(bucket.names) for bucket in self._state.buckets]

    # ------------------------------------------------------------------ steps

    def run(self, until: int) -> Outcome:
        """Run steps up to ``until``, or until somebody's :meth:`interrupt`, then save.

        Raises:
            TransportError: a peer is gone; nothing of the step in question was applied here
                unless every worker could apply it.
            DivergedError: loss or gradients are not finite.
        """
        steps = self._steps
        assert steps is not None
        assert self._copier is not None
        assert self._saver is not None
        self._trains = True
        self.memory.close()
        self._copier.begin()
        totals, first = Totals(0.0, 0.0), steps.computing
        interval = self.assignment.job.checkpoint.interval
        while steps.computing <= until and not (totals.stop or totals.pause):
            step = steps.computing
            tracing = first < step <= first + self.assignment.job.run.trace_steps
            self._tracer.enabled = tracing
            saves = bool(interval) and step % interval == 0
            totals = self._run_step(steps, last=saves or step == until)
            if saves:
                self._saver.save(steps.step, steps.scale)
        self._tracer.enabled = False
        interrupted = totals.stop or totals.pause
        paused = totals.pause and not totals.stop and steps.step < until
        if not paused:
            self._saver.save(steps.step, steps.scale)
            self._saver.finish()
        return Outcome(steps.step, interrupted, self._state.updates, steps.scale, paused)

    def _run_step(self, steps: Stepping, last: bool) -> Totals:
        assert self._copier is not None
        before, step = steps.step, steps.computing
        self._missing = None
        self._state.clear_gradients()
        steps.begin()
        try:
            loss = self._executor.run(step, steps.loss_factor, self.assignment.deadline_s)
            asked = self._stopping.is_set(), self._pausing.is_set()
            totals = steps.finish(lambda: self._complete(steps, loss), asked, last)
        except AbortedError:
            if self._failure is not None:
                raise self._failure from None  # what it was aborted for
            raise
        if steps.step > before:
            self._copier.committed(steps.step)
        return totals

    def _complete(self, steps: Stepping, loss_sum: torch.Tensor | None) -> float:
        """Wait until the gradients are summed, and all else that a commit relies on is done."""
        deadline_s = self.assignment.deadline_s
        self._sync.finish(deadline_s)
        if self._state.residuals is not None:
            self._state.residuals.release(steps.scale.factor)
        if self.device.type == "cuda":
            # Reading a number waits for the GPU without a deadline; these waits have one.
            self._links.synchronize(deadline_s)
        assert self._copier is not None
        self._copier.finish()
        return 0.0 if loss_sum is None else float(loss_sum)

    def _failed(self, error: BaseException) -> None:
        """A thread of this worker's has failed: the one that computes is not to wait for peers."""
        self._failure = error
        self.abort()

    def observe(self) -> Observed:
        """What was measured since the last call; from any thread, while steps run."""
        a, gauge, emulation = self.assignment, self._gauge, self._links.emulation
        return Observed(
            generation=a.generation,
            microbatch_s=None if gauge is None else gauge.microbatch_s(),
            shaped={} if emulation is None else emulation.carried(a.device),
            addresses=self._meter.read(self._links.peers),
        )

    # ------------------------------------------------------------------ after the generation

    def standing(self) -> Standing:
        """Where this worker stands; call it once :meth:`build` and :meth:`run` have returned."""
        if not self._trains or self._steps is None:
            # What it has is what the memory says; it has committed nothing here.
            return Standing(None, None, None, (), self.memory.holdings())
        return self._steps.standing(self.memory)

    def settle(self, totals: Totals) -> Standing:
        """Commit the step that others have committed, with their totals.

        Raises:
            DivergedError: as they did.
        """
        assert self._steps is not None
        self._steps.settle(totals)
        return self.standing()

    # ------------------------------------------------------------------ ending

    def trace(self) -> list[Any]:
        """Spans recorded so far; they are handed over once."""
        return self._tracer.drain()

    def interrupt(self, pause: bool = False) -> None:
        """End all workers' run after the step that is running (or the next); from any thread.

        Args:
            pause: for a new generation: nothing is saved.
        """
        (self._pausing if pause else self._stopping).set()

    def abort(self) -> None:
        """End the generation for all its members at once; from any thread."""
        self._aborted.set()
        if self._phases is not None:
            self._phases.enter("recovery")
        self._links.abort()
        self._streams.abort()
        if self._copier is not None:
            self._copier.abort()

    def close(self) -> None:
        """Give everything back."""
        self._links.close()
        self._streams.abort()
        self._forget_arrivals()
        if self._copier is not None:
            self._copier.close()
        if self._saver is not None:
            self._saver.close()
        if self._steps is not None:
            self._steps.close()


def _no_batches(step: int, microbatch: int) -> tuple[torch.Tensor, torch.Tensor]:
    raise AssertionError("a stage in the middle asks for no data")


def _untold(record: StepRecord) -> None:
    """Rank 0 tells of a step, the others don't."""
