"""The Ray actor around one device: it passes calls on to a :class:`StageRuntime`."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import ray
import torch
from ray.util import get_node_ip_address
from torch.distributed import TCPStore

from ray_train_geo.errors import StorageError
from ray_train_geo.model.catalog import ModelDims
from ray_train_geo.observe.trace import Span
from ray_train_geo.spec import TrainingSpec
from ray_train_geo.training.assignment import Assignment, Outcome, StepRecord
from ray_train_geo.training.checkpoint import CheckpointPart, CheckpointStore
from ray_train_geo.training.measure import device_memory_bytes, sustained_flops_per_s
from ray_train_geo.training.runtime import StageRuntime
from ray_train_geo.transport.nccl import nccl_available
from ray_train_geo.transport.ping import PingServer, round_trip_s

__all__ = ["StageWorker", "WorkerInfo"]


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """Where a worker runs, and on what.

    Args:
        memory_bytes: the GPU's; None on a CPU.
        nccl: CuPy's NCCL can be used here.
        ping_port: where a :class:`PingServer` answers.
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
    ping_port: int
    sees_storage: bool


class _ToCoordinator:
    """Reports by calls that nobody waits for."""

    def __init__(self, coordinator: Any, generation: int) -> None:
        self._coordinator = coordinator
        self._generation = generation

    def committed(self, record: StepRecord) -> None:
        self._coordinator.committed.remote(self._generation, record)

    def part_written(self, step: int, part: CheckpointPart, state: Mapping[str, Any]) -> None:
        self._coordinator.part_written.remote(self._generation, step, part, dict(state))

    def part_failed(self, step: int, rank: int, error: StorageError) -> None:
        self._coordinator.part_failed.remote(self._generation, step, rank, error)


_remote: Any = ray.remote  # its stubs don't know concurrency groups


@_remote(concurrency_groups={"control": 2})
class StageWorker:
    """One device.  ``build`` and ``run`` take their time; ``control`` calls get through to them."""

    def __init__(self, coordinator: Any) -> None:
        self._coordinator = coordinator
        self._device = torch.device("cuda:0" if torch.cuda.is_available() and _has_gpu() else "cpu")
        self._runtime: StageRuntime | None = None
        self._interrupted = False
        self._ping_server = PingServer(get_node_ip_address())

    def hello(
        self, dims: ModelDims, training: TrainingSpec, checkpoint_root: str, probe: str
    ) -> WorkerInfo:
        """Say where and what this is, and measure the device on the job's layers."""
        context = ray.get_runtime_context()
        return WorkerInfo(
            pid=os.getpid(),
            node_id=context.get_node_id(),
            host=socket.gethostname(),
            address=get_node_ip_address(),
            device=str(self._device),
            flops_per_s=sustained_flops_per_s(dims, training, self._device),
            memory_bytes=device_memory_bytes(self._device),
            nccl=self._device.type == "cuda" and nccl_available(),
            ping_port=self._ping_server.port,
            sees_storage=CheckpointStore(checkpoint_root).sees(probe),
        )

    def ping(self, targets: Mapping[str, tuple[str, int]]) -> dict[str, float]:
        """Round trips to the workers at ``targets`` (address, port), in seconds, by name."""
        return {name: round_trip_s(host, port) for name, (host, port) in targets.items()}

    def build(self, assignment: Assignment, store_host: str, store_port: int) -> None:
        """Take a role in a new generation; the role in the old one, if any, ends."""
        if self._runtime is not None:
            self._runtime.close()
        store = TCPStore(store_host, store_port, timeout=timedelta(seconds=assignment.deadline_s))
        reporter = _ToCoordinator(self._coordinator, assignment.generation)
        self._runtime = StageRuntime(assignment, store, self._device, reporter)
        try:
            self._runtime.build()
        except BaseException:
            self._runtime.abort()
            raise

    def run(self, until: int) -> Outcome:
        """Run steps until ``until`` or an interrupt; an error ends the generation for all."""
        assert self._runtime is not None
        if self._interrupted:
            self._runtime.interrupt()
        try:
            return self._runtime.run(until)
        except BaseException:
            self._runtime.abort()
            raise

    @ray.method(concurrency_group="control")
    def interrupt(self) -> None:
        self._interrupted = True
        if self._runtime is not None:
            self._runtime.interrupt()

    @ray.method(concurrency_group="control")
    def abort(self) -> None:
        if self._runtime is not None:
            self._runtime.abort()

    @ray.method(concurrency_group="control")
    def trace(self) -> list[Span]:
        return [] if self._runtime is None else self._runtime.trace()


def _has_gpu() -> bool:
    """Ray assigned a GPU to this actor (a CPU worker on a GPU node sees all of them)."""
    return bool(ray.get_gpu_ids())
