"""The Ray actor around one device: it passes calls on to a :class:`StageRuntime`.

A worker outlives its generations: what it has in memory, and the data that it has opened, serve
the next one.  It also outlives a coordinator that is killed: it trains on, keeps its reports, and
tells the successor how the generation went.  If none comes, it ends itself.
"""

from __future__ import annotations

import dataclasses
import gc
import os
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import ray
import torch
from ray.util import get_node_ip_address
from torch.distributed import TCPStore

from ray_train_geo.actors.reports import GenerationReporter, Outbox
from ray_train_geo.cluster.probing import Reading
from ray_train_geo.errors import AbortedError, TransportError
from ray_train_geo.model.catalog import ModelDims
from ray_train_geo.observe.phases import phase_page
from ray_train_geo.observe.trace import Span
from ray_train_geo.spec import JobSpec, TrainingSpec
from ray_train_geo.training.assignment import Assignment, Outcome
from ray_train_geo.training.batches import BatchSource
from ray_train_geo.training.checkpoint import CheckpointStore, get_ready
from ray_train_geo.training.emulated_links import EmulatedLinks
from ray_train_geo.training.gauge import Observed
from ray_train_geo.training.links import Links
from ray_train_geo.training.measure import device_memory_bytes, sustained_flops_per_s
from ray_train_geo.training.memory import Memory
from ray_train_geo.training.runtime import StageRuntime
from ray_train_geo.training.standing import Standing, Totals
from ray_train_geo.transport.nccl import nccl_available
from ray_train_geo.transport.ping import round_trip_s
from ray_train_geo.transport.reading import Station, StationServer, read
from ray_train_geo.transport.state_stream import Address, StateServer

__all__ = ["Adopted", "StageWorker", "WorkerInfo"]

_FIRST_WORD_S = 300.0
"""Until all workers of a crew have started, none hears from the coordinator."""
_LOOK_S = 1.0
_ORPHANED = 3


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """Where a worker runs, and on what.

    Args:
        memory_bytes: the GPU's; None on a CPU.
        nccl: CuPy's NCCL can be used here.
        station: where it answers pings, and swallows what is sent to measure.
        state: where its state is served.
        sees_storage: the coordinator's probe file is visible in checkpoint storage.
    """

    pid: int
    node_id: str
    host: str
    address: str
    device: str
    flops_per_s: float
    memory_bytes: int | None
    nccl: bool
    station: Station
    state: Address
    sees_storage: bool


@dataclass(frozen=True, slots=True)
class Adopted:
    """What a worker tells a new coordinator.

    Args:
        begun: the last generation in which it has run steps.
        silence_s: for how long it has heard from no coordinator; None if it never has.
    """

    begun: int
    silence_s: float | None


_remote: Any = ray.remote  # its stubs don't know concurrency groups


@_remote(concurrency_groups={"control": 3})
class StageWorker:
    """One device.  ``build`` and ``run`` take their time; ``control`` calls get through to them.

    Args:
        coordinator: the actor to report to.
        patience_s: without a coordinator for so long, the worker ends itself.
    """

    def __init__(self, coordinator: Any, patience_s: float) -> None:
        self._outbox = Outbox(coordinator)
        self._ended_as: tuple[int, Outcome | BaseException] | None = None
        self._device = torch.device("cuda:0" if torch.cuda.is_available() and _has_gpu() else "cpu")
        cpus = ray.get_runtime_context().get_assigned_resources().get("CPU", 0.0)
        torch.set_num_threads(max(1, int(cpus)))
        self._runtime: StageRuntime | None = None
        self._ahead: Links | None = None
        self._emulated: EmulatedLinks | None = None
        self._memory = Memory()
        self._source = BatchSource()
        self._phases = phase_page()
        self._stopping = False
        self._begun = 0
        self._ended = 0
        address = get_node_ip_address()
        self._station = StationServer(address)
        self._state_server = StateServer(address, self._memory)
        threading.Thread(target=self._listen, args=(patience_s,), daemon=True).start()

    def hello(
        self, dims: ModelDims, training: TrainingSpec, checkpoint_root: str, probe: str
    ) -> WorkerInfo:
        """Say where and what this is, and measure the device on the job's layers."""
        context = ray.get_runtime_context()
        flops_per_s = sustained_flops_per_s(dims, training, self._device)
        if training.recompute or training.compile:
            pass  # long, and else in the midst of the first step
        # What is loaded by now stays: a collection between two generations need not look at it.
        gc.collect()
        gc.freeze()
        return WorkerInfo(
            pid=os.getpid(),
            node_id=context.get_node_id(),
            host=socket.gethostname(),
            address=get_node_ip_address(),
            device=str(self._device),
            flops_per_s=flops_per_s,
            memory_bytes=device_memory_bytes(self._device),
            nccl=self._device.type == "cuda" and nccl_available(),
            station=self._station.station,
            state=self._state_server.address,
            sees_storage=CheckpointStore(checkpoint_root).sees(probe),
        )

    def warm_up(self, job: JobSpec, dims: ModelDims, fingerprint: str) -> None:
        """Do what takes long the first time, while nobody waits for this worker."""
        self._source.open(job, dims, fingerprint)
        get_ready()

    @ray.method(concurrency_group="control")
    def prepare(self, assignment: Assignment, store_host: str, store_port: int) -> None:
        """Make the links of the next generation, while the one before trains on."""
        store = _rendezvous(store_host, store_port, assignment.deadline_s)
        before, self._ahead = self._ahead, Links(assignment, store, self._device)
        if before is not None:
            _end(before)
        links = self._ahead
        if assignment.generation <= self._ended:  # an abort that came before it had a target
            links.abort()
        try:
            links.join()
        except BaseException:
            links.abort()
            raise

    def build(
        self, assignment: Assignment, store_host: str, store_port: int, ahead: bool = False
    ) -> float:
        """Take a role in a new generation; the role in the old one, if any, ends.

        Args:
            ahead: :meth:`prepare` has made its links.

        Returns:
            Seconds that it took to get the stage's state.
        """
        self._leave()
        if assignment.generation <= self._ended:
            raise AbortedError(f"generation {assignment.generation} has ended")
        scaling, emulation = assignment.job.scaling, None
        if scaling.emulate_links and scaling.topology is not None:
            self._emulated = EmulatedLinks(Path(scaling.topology), assignment.plan.devices)
            emulation = self._emulated.emulation
        links, self._ahead = self._ahead, None
        if links is not None and not (ahead and links.generation == assignment.generation):
            _end(links)
            links = None
        if links is None:
            if ahead:
                raise AbortedError(f"generation {assignment.generation} has no links here")
            store = _rendezvous(store_host, store_port, assignment.deadline_s)
            links = Links(assignment, store, self._device, emulation)
        runtime = StageRuntime(
            assignment, links, self._device, GenerationReporter(self._outbox, links.generation),
            self._memory, self._source, self._phases,
        )  # fmt: skip
        self._runtime = runtime
        if assignment.generation <= self._ended:  # an abort that came before it had a target
            runtime.abort()
        try:
            runtime.build()
        except BaseException:
            runtime.abort()
            raise
        return runtime.fetch_s

    def give(self, generation: int) -> None:
        """Without a role in ``generation``: let the others have what is in memory.

        The role in the old one ends: where the others get without this worker, it need not follow.
        """
        self._leave()
        if self._ahead is not None:
            _end(self._ahead)
            self._ahead = None
        self._memory.enter(generation)

    def _leave(self) -> None:
        self._ended_as = None  # an error's frames hold tensors
        if self._runtime is not None:
            self._runtime.close()
            self._runtime = None
            gc.collect()  # hooks and modules of the old stage refer to each other
        if self._emulated is not None:
            self._emulated.close()
            self._emulated = None

    def run(self, until: int) -> Outcome:
        """Run steps until ``until`` or an interrupt; an error ends the generation for all.

        Once it returns, the coordinator has heard all reports.
        """
        runtime = self._runtime
        assert runtime is not None
        if self._stopping:
            runtime.interrupt()
        self._begun = generation = runtime.assignment.generation
        try:
            outcome = runtime.run(until)
        except BaseException as e:
            runtime.abort()
            self._ended_as = generation, e
            raise
        self._outbox.flush()
        self._ended_as = generation, outcome
        return outcome

    def outcome(self, generation: int) -> Outcome:
        """How :meth:`run` ended in ``generation``, for a coordinator that did not call it.

        Calls are taken in turn: while it runs, this one waits.
        """
        number, end = self._ended_as or (0, None)
        if number != generation or end is None:
            raise AbortedError(f"generation {generation} does not run here")
        if isinstance(end, BaseException):
            raise end
        return end

    def standing(self, after: int) -> Standing:
        """Where this worker stands, after its generation has ended.

        Args:
            after: only records of later steps are wanted.
        """
        if self._runtime is None:
            return Standing(None, None, None, (), self._memory.holdings())
        return _since(after, self._runtime.standing())

    def settle(self, totals: Totals, after: int) -> Standing:
        """Commit what others have committed."""
        assert self._runtime is not None
        return _since(after, self._runtime.settle(totals))

    @ray.method(concurrency_group="control")
    def adopt(self) -> Adopted:
        """A new coordinator is there: it hears of what its predecessor may have heard alone."""
        self._outbox.repeat_part()
        return Adopted(self._begun, self._station.silence_s())

    @ray.method(concurrency_group="control")
    def ping(self, targets: Mapping[str, Station]) -> dict[str, float]:
        """Round trips to the workers at ``targets``, in seconds, by name."""
        return {name: round_trip_s(at.address, at.ping_port) for name, at in targets.items()}

    @ray.method(concurrency_group="control")
    def read(self, target: Station, flows: int, seconds: float) -> Reading:
        """What the way to ``target`` carries."""
        return read(target, flows, seconds)

    @ray.method(concurrency_group="control")
    def stop(self) -> None:
        """Stop all workers after a step, with a checkpoint."""
        self._stopping = True
        if self._runtime is not None:
            self._runtime.interrupt()

    @ray.method(concurrency_group="control")
    def pause(self, generation: int) -> None:
        """End the generation after a step, for the next one."""
        runtime = self._runtime
        if runtime is not None and runtime.assignment.generation == generation:
            runtime.interrupt(pause=True)

    @ray.method(concurrency_group="control")
    def abort(self, generation: int) -> None:
        """End ``generation`` at once, whether it runs, is being built, or has yet to be."""
        self._ended = max(self._ended, generation)
        runtime = self._runtime
        if runtime is not None and runtime.assignment.generation <= generation:
            runtime.abort()
        if self._ahead is not None:
            self._ahead.abort()

    @ray.method(concurrency_group="control")
    def forsake(self) -> None:
        """The links that were made ahead are not needed."""
        if self._ahead is not None:
            self._ahead.abort()

    @ray.method(concurrency_group="control")
    def observe(self) -> Observed | None:
        """What was measured since the last call; None between generations."""
        runtime = self._runtime
        return None if runtime is None else runtime.observe()

    @ray.method(concurrency_group="control")
    def trace(self) -> list[Span]:
        return [] if self._runtime is None else self._runtime.trace()

    def _listen(self, patience_s: float) -> None:
        """End this process once there was no coordinator for too long."""
        silent_s = 0.0
        while True:
            time.sleep(_LOOK_S)
            heard_s = self._station.silence_s()
            # Only seconds in which this process could have heard something count.
            silent_s += _LOOK_S
            if heard_s is not None:
                silent_s = min(silent_s, heard_s)
            if silent_s > (patience_s if heard_s is not None else _FIRST_WORD_S):
                os._exit(_ORPHANED)


def _rendezvous(host: str, port: int, deadline_s: float) -> TCPStore:
    """The coordinator's store.

    Raises:
        TransportError: it is gone.
    """
    try:
        # Refused at once, if nobody listens there any more: torch would try until the deadline.
        socket.create_connection((host, port), deadline_s).close()
        return TCPStore(host, port, timeout=timedelta(seconds=deadline_s))
    except (OSError, RuntimeError) as e:  # torch's DistError is one
        raise TransportError(f"the coordinator's store is gone: {e}") from None


def _end(links: Links) -> None:
    links.abort()
    links.close()


def _since(after: int, standing: Standing) -> Standing:
    records = tuple(record for record in standing.records if record.step > after)
    return dataclasses.replace(standing, records=records)


def _has_gpu() -> bool:
    """Ray assigned a GPU to this actor (a CPU worker on a GPU node sees all of them)."""
    return bool(ray.get_gpu_ids())
