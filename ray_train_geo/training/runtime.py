"""One worker's whole part of a generation: join, load, and run steps.  It knows nothing of Ray.

    step k:   forward/backward of all microbatches          executor
              gradients summed over each layer's holders    gradient_sync, overlapped
              one small all-reduce over all workers:        loss, norm, overflow, interrupt
              AdamW                                         everywhere, or nowhere

The small all-reduce is the commit point.  It can complete only when every worker has its reduced
gradients, and what it returns (norm, overflow, whether to stop) is the same for all, so all of
them clip alike, skip alike, and stop after the same step.
"""

from __future__ import annotations

import math
import threading
import time
import zlib
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed import PrefixStore, Store

from ray_train_geo.data.dataset import open_dataset
from ray_train_geo.data.order import SampleOrder
from ray_train_geo.errors import DataError, DivergedError, StorageError
from ray_train_geo.model.stage import build_stage
from ray_train_geo.observe.trace import Tracer
from ray_train_geo.schedule.actions import Action
from ray_train_geo.schedule.gpipe import gpipe
from ray_train_geo.schedule.one_f_one_b import one_f_one_b
from ray_train_geo.training.assignment import Assignment, Outcome, Reporter, StepRecord
from ray_train_geo.training.buckets import holders_of, make_buckets
from ray_train_geo.training.channel import Receiver, Sender
from ray_train_geo.training.checkpoint import (
    CheckpointStore,
    read_tensors,
    write_part,
)
from ray_train_geo.training.executor import Batches, Edges, StageExecutor
from ray_train_geo.training.gradient_sync import GradientSync
from ray_train_geo.training.groups import WORLD, Group, join_groups
from ray_train_geo.training.optimizer import MOMENTS, learning_rate
from ray_train_geo.training.precision import DTYPES, LossScale
from ray_train_geo.training.state import StageState
from ray_train_geo.transport.base import Transport
from ray_train_geo.transport.gloo import GlooEndpoint
from ray_train_geo.transport.nccl import NcclTransport

__all__ = ["StageRuntime"]

_CHANNEL_SENDS = 8
_SMALLEST_LOSS_SCALE = 2.0**-20


class StageRuntime:
    """A worker in one generation.  Methods but ``interrupt`` and ``abort`` are for one thread.

    Args:
        store: rendezvous for all workers of the run.
        device: what the stage computes on.
        reporter: is told what happens.
    """

    def __init__(
        self, assignment: Assignment, store: Store, device: torch.device, reporter: Reporter
    ) -> None:
        self.assignment = assignment
        self.device = device
        self._store = PrefixStore(f"generation{assignment.generation}", store)
        self._reporter = reporter
        self._interrupted = threading.Event()
        self._endpoint = GlooEndpoint(self._store, assignment.hostname, assignment.deadline_s)
        self._transports: dict[str, Transport] = {}
        self._tracer = Tracer(enabled=False)
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None
        self._saved_step = 0
        self.step = 0

    # ------------------------------------------------------------------ getting ready

    def build(self) -> None:
        """Build the stage, load its state, and join all groups.

        Raises:
            DataError, CheckpointError: the input can't be used on this node.
            TransportError: a peer did not come.
        """
        a = self.assignment
        plan, role, training = a.plan, a.role, a.job.training
        pipeline = plan.pipelines[role.pipeline]
        first, last = plan.stage(role).layers
        batches = self._open_data() if first == 0 or last == plan.layers else None
        module = build_stage(
            a.dims,
            first,
            last,
            seed=training.seed,
            device=self.device,
            recompute=training.recompute,
        )
        sizes = {name: p.numel() for name, p in module.named_parameters()}
        buckets = make_buckets(sizes, plan, a.dims, a.job.parallelism.bucket_bytes)
        self._state = StageState(module, training, buckets)
        if training.compile:
            for layer in module.layers.values():
                layer.compile()
        self._scale = LossScale.start(training.precision, training.loss_scale)
        self._load()
        self._transports = join_groups(plan, a.dims, a.rank, self._connect)
        self._sync = GradientSync(
            buckets,
            self._state.buffers,
            {
                bucket.holders: self._transports["sync/" + "-".join(map(str, bucket.holders))]
                for bucket in buckets
                if len(bucket.holders) > 1
            },
            plan.gradient_sync,
            self._tracer,
        )
        self._count_arrivals()
        self._executor = StageExecutor(
            module=module,
            actions=self._actions(),
            first_microbatch=pipeline.first_microbatch,
            batches=batches or _no_batches,
            edges=self._edges(),
            seed=training.seed,
            tracer=self._tracer,
            before_last_backward=self._begin_arrivals,
        )

    def _open_data(self) -> Batches:
        a = self.assignment
        training = a.job.training
        data = open_dataset(a.job.data, training.seq_len)
        data.require_vocab(a.dims.vocab_size)
        if a.data_fingerprint is not None and data.fingerprint != a.data_fingerprint:
            raise DataError(
                f"data.path {a.job.data.path} holds other tokens on {a.hostname} than on the head "
                "node; every node must see the same data"
            )
        order = SampleOrder(
            seed=training.seed,
            samples=data.samples,
            global_batch=training.global_batch,
            microbatch=training.microbatch,
        )

        def batches(step: int, microbatch: int) -> tuple[torch.Tensor, torch.Tensor]:
            inputs, targets = data.batch(order.indices(step, microbatch))
            return (
                torch.from_numpy(inputs).to(self.device),
                torch.from_numpy(targets).to(self.device),
            )

        return batches

    def _load(self) -> None:
        start = self.assignment.start
        if start is None:
            return
        kinds = ("model",) if start.weights_only else ("model", *MOMENTS)
        names = {n: t for n, t in self._state.tensors().items() if n.partition(".")[0] in kinds}
        # One tensor's host copy at a time would reread the files; a stage's state fits the host.
        host = {n: torch.empty_like(t, device="cpu") for n, t in names.items()}
        read_tensors(start.location, start.manifest, host)
        if start.weights_only:
            self._state.load(host, updates=0)
            return
        manifest = start.manifest
        self._state.load(host, manifest.updates)
        if self.assignment.job.training.precision == manifest.identity["precision"]:
            self._scale = LossScale(manifest.loss_scale, manifest.good_steps)
        self.step = self._saved_step = manifest.step

    def _connect(self, group: Group, rank: int) -> Transport:
        a = self.assignment
        if a.transport == "nccl" and group.name != WORLD:
            return NcclTransport.connect(
                self._store, group.name, rank, len(group.members), self.device, a.deadline_s
            )
        return self._endpoint.connect(group.name, rank, len(group.members))

    def _actions(self) -> list[Action]:
        a = self.assignment
        pipeline = a.plan.pipelines[a.role.pipeline]
        if a.plan.schedule == "gpipe":
            stages = gpipe(len(pipeline.stages), pipeline.microbatches)
        else:
            stages = one_f_one_b([s.warmup for s in pipeline.stages], pipeline.microbatches)
        return stages[a.role.stage]

    def _edges(self) -> Edges:
        a = self.assignment
        training, rank = a.job.training, a.rank
        shape = (training.microbatch, training.seq_len, a.dims.dim)
        warmup = a.plan.stage(a.role).warmup

        def receiver(name: str) -> Receiver | None:
            transport = self._transports.get(name)
            if transport is None or transport.rank != 1:
                return None
            dtype = DTYPES[training.precision]
            return Receiver(transport, 0, shape, dtype, self.device, warmup + 2, self._tracer)

        def sender(name: str) -> Sender | None:
            transport = self._transports.get(name)
            if transport is None or transport.rank != 0:
                return None
            return Sender(transport, 1, self._tracer, limit=max(_CHANNEL_SENDS, warmup + 1))

        return Edges(
            activation_in=receiver(f"activations/{rank - 1}"),
            activation_out=sender(f"activations/{rank}"),
            gradient_in=receiver(f"gradients/{rank + 1}"),
            gradient_out=sender(f"gradients/{rank}"),
        )

    def _count_arrivals(self) -> None:
        """During the last backward, tell the sync of each bucket once all its weights are in."""
        bucket_of = {n: i for i, b in enumerate(self._state.buckets) for n in b.names}
        self._missing: list[int] | None = None

        def arrived(name: str) -> None:
            if self._missing is not None:
                index = bucket_of[name]
                self._missing[index] -= 1
                if not self._missing[index]:
                    self._sync.ready(index)

        self._state.on_gradient(arrived)

    def _begin_arrivals(self) -> None:
        self._missing = [len(bucket.names) for bucket in self._state.buckets]

    # ------------------------------------------------------------------ steps

    def run(self, until: int) -> Outcome:
        """Run steps up to ``until``, or until somebody's :meth:`interrupt`, then save.

        Raises:
            TransportError: a peer is gone; nothing of the step in question was applied here
                unless every worker could apply it.
            DivergedError: loss or gradients are not finite.
        """
        interrupted, first = False, self.step + 1
        while self.step < until and not interrupted:
            step = self.step + 1
            tracing = first < step <= first + self.assignment.job.run.trace_steps
            self._tracer.enabled = tracing
            interrupted = self._run_step(step)
            interval = self.assignment.job.checkpoint.interval
            if interval and step % interval == 0:
                self.save()
        self._tracer.enabled = False
        if self._saved_step != self.step or (self.step == 0 and self._writing is None):
            self.save()
        if self._writing is not None:
            self._writing.result()
        return Outcome(self.step, interrupted, self._state.updates, self._scale)

    def _run_step(self, step: int) -> bool:
        a = self.assignment
        training, began = a.job.training, time.perf_counter()
        self._missing = None
        self._state.clear_gradients()
        self._sync.begin(step)
        # Of the mean loss of the step, as the field does it: a microbatch's part is small, which
        # leaves fp16 headroom.
        loss_factor = self._scale.factor / training.total_microbatches
        loss_sum = self._executor.run(step, loss_factor, a.deadline_s)
        self._sync.finish(a.deadline_s)
        if self.device.type == "cuda":
            # Reading a number waits for the GPU without a deadline; these waits have one.
            for transport in self._transports.values():
                transport.synchronize(a.deadline_s)
        with self._tracer.span("optimizer", "commit", step):
            totals = self._agree(0.0 if loss_sum is None else float(loss_sum))
        unscale = 1.0 / self._scale.factor
        norm = math.sqrt(totals.squared_norm) * unscale
        rate, scale = learning_rate(step, training), self._scale
        overflow = not math.isfinite(norm)
        if overflow and training.precision != "fp16":
            raise DivergedError(
                f"step {step}: loss {totals.loss_sum / training.tokens_per_step:g}, gradient norm "
                f"{norm:g}; nothing of this step was applied. Lower training.lr, or resume from an "
                "earlier checkpoint"
            )
        if not overflow:
            clip = min(1.0, training.grad_clip / (norm + 1e-6)) if training.grad_clip else 1.0
            with self._tracer.span("optimizer", "AdamW", step):
                self._state.apply(rate, unscale * clip)
        self._scale = scale.after(overflow, training.precision, training.loss_scale)
        if self._scale.factor < _SMALLEST_LOSS_SCALE:
            raise DivergedError(f"step {step}: gradients overflow at every loss scale")
        self.step = step
        if a.rank == 0:
            self._reporter.committed(
                StepRecord(
                    step=step,
                    time=time.time(),
                    loss=totals.loss_sum / training.tokens_per_step,
                    grad_norm=norm,
                    learning_rate=rate,
                    loss_scale=scale.factor,
                    skipped=overflow,
                    step_s=time.perf_counter() - began,
                )
            )
        return totals.interrupted

    def _agree(self, loss_sum: float) -> _Totals:
        """The commit point: sums over all workers, the same for all."""
        mine = torch.tensor(
            [loss_sum, self._state.squared_norm(self.assignment.rank), self._interrupted.is_set()],
            dtype=torch.float64,
        )
        self._transports[WORLD].all_reduce(mine).wait(self.assignment.deadline_s)
        loss, squared_norm, interrupts = mine.tolist()
        return _Totals(loss, squared_norm, interrupts > 0)

    # ------------------------------------------------------------------ checkpoints

    def save(self) -> None:
        """Copy this worker's share of the state, and write it in the background."""
        a, step = self.assignment, self.step
        if self._writing is not None:
            self._writing.result()  # at most one copy in memory
        share = {
            name: tensor.to("cpu", copy=True)
            for name, tensor in self._state.tensors(self._share()).items()
        }
        state = {
            "updates": self._state.updates,
            "loss_scale": self._scale.factor,
            "good_steps": self._scale.good_steps,
        }
        location = CheckpointStore(a.checkpoint_root).writing(step, a.generation)

        def write() -> None:
            try:
                part = write_part(location, a.rank, share)
            except StorageError as e:
                self._reporter.part_failed(step, a.rank, e)
            else:
                self._reporter.part_written(step, part, state)

        self._saved_step = step
        self._writing = self._writer.submit(write)

    def _share(self) -> list[str]:
        """Weights that this worker saves: those of each bucket are spread over its holders."""
        a = self.assignment
        names = []
        for name in self._state.weights:
            holders = holders_of(name, a.plan, a.dims)
            if holders[zlib.crc32(name.encode()) % len(holders)] == a.rank:
                names.append(name)
        return names

    # ------------------------------------------------------------------ ending

    def trace(self) -> list[Any]:
        """Spans recorded so far; they are handed over once."""
        return self._tracer.drain()

    def interrupt(self) -> None:
        """Stop all workers after the step that is running (or the next); from any thread."""
        self._interrupted.set()

    def abort(self) -> None:
        """End the generation for all its members at once; from any thread."""
        self._endpoint.abort()
        for transport in list(self._transports.values()):
            transport.abort()

    def close(self) -> None:
        """Give everything back."""
        for transport in self._transports.values():
            transport.close()
        self._transports = {}
        self._writer.shutdown(wait=False)


@dataclass(frozen=True, slots=True)
class _Totals:
    loss_sum: float
    squared_norm: float
    interrupted: bool


def _no_batches(step: int, microbatch: int) -> tuple[torch.Tensor, torch.Tensor]:
    raise AssertionError("a stage in the middle asks for no data")
