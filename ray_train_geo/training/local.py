"""Runs a plan on this machine without Ray: one process (or thread) a worker, and a store.

For tests, benchmarks and machines without Ray.  There is no coordinator: nothing is planned anew
when a worker dies, the run just ends with its error.
"""

from __future__ import annotations

import math
import multiprocessing
import queue
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import HashStore, Store, TCPStore

from ray_train_geo.cluster.topology import Topology
from ray_train_geo.errors import AbortedError, GeoError, StorageError, TransportError, WorkerError
from ray_train_geo.model.catalog import ModelDims
from ray_train_geo.observe.trace import Span
from ray_train_geo.planning.plan import Plan
from ray_train_geo.spec import JobSpec
from ray_train_geo.training.assignment import Assignment, Outcome, Start, StepRecord
from ray_train_geo.training.checkpoint import CheckpointPart, CheckpointStore
from ray_train_geo.training.collector import CheckpointCollector
from ray_train_geo.training.emulation import Emulation
from ray_train_geo.training.identity import identity
from ray_train_geo.training.links import Links
from ray_train_geo.training.on_time import on_time
from ray_train_geo.training.runtime import StageRuntime

__all__ = ["LocalResult", "run_local"]

_WITNESS_S = 3.0


@dataclass(slots=True)
class LocalResult:
    """What a local run gave: one record a step, and why it ended.

    Args:
        spans: by rank, of the steps that the job wants traced.
        simulated: devices and links were emulated, so times are no measurement of any.
    """

    records: list[StepRecord] = field(default_factory=list)
    outcome: Outcome | None = None
    spans: dict[int, list[Span]] = field(default_factory=dict)
    simulated: bool = False


@dataclass(frozen=True, slots=True)
class _Task:
    """What a worker is started with."""

    assignment: Assignment
    device: str
    emulated: Topology | None
    until: int


@dataclass(slots=True)
class _Ended:
    """A worker's last message; ``error`` is (is it a consequence of another's, error, trace)."""

    rank: int
    outcome: Outcome | None = None
    spans: list[Span] = field(default_factory=list)
    error: tuple[bool, BaseException, str] | None = None


class _QueueReporter:
    def __init__(self, put: Callable[[Any], None]) -> None:
        self._put = put

    def committed(self, record: StepRecord) -> None:
        self._put(record)

    def part_written(self, step: int, part: CheckpointPart, state: Mapping[str, Any]) -> None:
        self._put((step, part, dict(state)))

    def part_failed(self, step: int, rank: int, error: StorageError) -> None:
        self._put(error)


def run_local(
    job: JobSpec,
    dims: ModelDims,
    plan: Plan,
    *,
    device: str = "cpu",
    processes: bool = True,
    start: Start | None = None,
    until: int | None = None,
    deadline_s: float = 120.0,
    data_fingerprint: str = "",
    emulated: Topology | None = None,
) -> LocalResult:
    """Train ``job`` under ``plan``, one process (or thread) a stage.

    Args:
        device: torch device of every stage; stages may share one GPU.
        until: last step; the job's own number of steps by default.
        emulated: has the plan's devices; compute and links are as slow as there.  What several
            devices share is shared among threads only.

    Raises:
        PlanError: the plan can't be emulated.
        GeoError: what the first worker to fail raised.
    """
    context = multiprocessing.get_context("spawn")
    messages: Any = context.Queue() if processes else queue.Queue()
    assignments = [
        Assignment(
            job=job,
            dims=dims,
            plan=plan,
            rank=role.rank,
            generation=1,
            hostname="127.0.0.1",
            deadline_s=deadline_s,
            checkpoint_root=job.checkpoint.storage_path or str(job.run.directory / "checkpoints"),
            start=start,
        )
        for role in plan.roles()
    ]
    tasks = [_Task(a, device, emulated, until or job.training.steps) for a in assignments]
    emulation = None if emulated is None else Emulation(emulated)
    if emulation is not None:
        emulation.check(plan, dims, torch.device(device), job.local_sgd)
    workers: list[Any]
    if processes:
        server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        workers = [
            context.Process(target=_process, args=(task, server.port, messages)) for task in tasks
        ]
    else:
        shared = HashStore()
        workers = [
            threading.Thread(target=_work, args=(task, shared, emulation, messages), daemon=True)
            for task in tasks
        ]
    for worker in workers:
        worker.start()
    collector = CheckpointCollector(
        CheckpointStore(assignments[0].checkpoint_root),
        generation=1,
        parts=plan.world_size,
        identity=identity(job, dims, data_fingerprint),
        plan=plan.to_json(),
        keep=job.checkpoint.keep,
    )
    try:
        result = _collect(messages, workers, collector)
    except BaseException:
        # One that waits for peers to join would do so until its deadline.
        for worker in workers:
            if processes:
                worker.terminate()
        raise
    for worker in workers:
        worker.join(deadline_s)
    result.simulated = emulated is not None
    return result


def _collect(messages: Any, workers: list[Any], collector: CheckpointCollector) -> LocalResult:
    result, running = LocalResult(), set(range(len(workers)))
    first_error: tuple[bool, BaseException, str] | None = None
    failed_s = math.inf
    # After an error the others are heard too, for it may follow from one of theirs.
    while running and time.monotonic() < failed_s + _WITNESS_S:
        try:
            message = messages.get(timeout=1.0)
        except queue.Empty:
            dead = [r for r in running if not workers[r].is_alive()]
            if dead and messages.empty():
                raise WorkerError(f"worker {dead[0]} ended without a word") from None
            continue
        match message:
            case StepRecord():
                result.records.append(message)
            case (step, part, state):
                collector.add(step, part, state)
            case StorageError():
                first_error = first_error or (False, message, "")
                failed_s = min(failed_s, time.monotonic())
            case _Ended():
                running.discard(message.rank)
                result.outcome = message.outcome or result.outcome
                result.spans[message.rank] = message.spans
                # The error that the others' broken links follow from is the one to report.
                if message.error and (first_error is None or first_error[0]):
                    first_error = message.error
                    failed_s = min(failed_s, time.monotonic())
    if first_error is not None:
        _, error, trace = first_error
        if isinstance(error, GeoError):
            raise error
        raise WorkerError(f"a worker failed: {error!r}\n{trace}") from error
    return result


def _process(task: _Task, port: int, messages: Any) -> None:
    torch.set_num_threads(1)
    store = TCPStore("127.0.0.1", port, timeout=timedelta(seconds=task.assignment.deadline_s))
    emulation = None if task.emulated is None else Emulation(task.emulated)
    _work(task, store, emulation, messages)


def _work(task: _Task, store: Store, emulation: Emulation | None, messages: Any) -> None:
    if emulation is not None:
        on_time()
    ended = _Ended(task.assignment.rank)
    device, reporter = torch.device(task.device), _QueueReporter(messages.put)
    links = Links(task.assignment, store, device, emulation)
    runtime = StageRuntime(task.assignment, links, device, reporter)
    try:
        runtime.build()
        ended.outcome = runtime.run(task.until)
        ended.spans = runtime.trace()
    except BaseException as e:
        consequence = isinstance(e, TransportError | AbortedError)
        ended.error = (consequence, e, traceback.format_exc())
        runtime.abort()
    finally:
        runtime.close()
        messages.put(ended)
