"""A planning problem: topology, job and dimensions, with the memory question asked of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ray_train_geo.cluster.topology import Device, Topology
from ray_train_geo.errors import PlanError
from ray_train_geo.model.catalog import ModelDims
from ray_train_geo.planning.memory import MemoryEstimate, is_cpu, largest, stage_memory_bytes
from ray_train_geo.spec import JobSpec

__all__ = ["DoesNotFitError", "Problem"]


class DoesNotFitError(PlanError):
    """A stage is too large for its device, by ``missing_bytes``."""

    def __init__(self, message: str, missing_bytes: int) -> None:
        super().__init__(message)
        self.missing_bytes = missing_bytes


@dataclass(frozen=True, slots=True)
class Problem:
    """What is planned, with memory estimates remembered: thousands of stages are alike."""

    topology: Topology
    job: JobSpec
    dims: ModelDims
    devices: Mapping[str, Device]
    _estimates: dict[tuple[int, bool, bool, int, bool, bool], MemoryEstimate] = field(
        default_factory=dict
    )

    @classmethod
    def of(cls, topology: Topology, job: JobSpec, vocab_size: int) -> Problem:
        devices = {device.id: device for device in topology.devices}
        return cls(topology, job, job.dims(vocab_size), devices)

    @property
    def gpipe(self) -> bool:
        return self.job.parallelism.schedule == "gpipe"

    def memory(
        self, layers: tuple[int, int], in_flight: int, device: Device, pipelines: int
    ) -> MemoryEstimate:
        """What the stage of ``layers`` needs on ``device`` in a plan of ``pipelines``."""
        first, last = layers[0] == 0, layers[1] == self.dims.layers
        # Gradients are exchanged among pipelines, and between two holders of a tied matrix.
        synced = pipelines > 1 or (self.dims.tied_embeddings and first != last)
        key = layers[1] - layers[0], first, last, in_flight, is_cpu(device), synced
        if key not in self._estimates:
            self._estimates[key] = stage_memory_bytes(
                self.dims,
                self.job.training,
                layers,
                in_flight,
                cpu=is_cpu(device),
                sync_bucket_bytes=self.job.parallelism.bucket_bytes if synced else 0,
            )
        return self._estimates[key]

    def check_memory(
        self,
        pipeline: int,
        layers: Sequence[tuple[int, int]],
        chain: Sequence[Device],
        in_flight: Sequence[int],
        pipelines: int,
    ) -> None:
        """Check all stages of pipeline number ``pipeline``.

        Raises:
            DoesNotFitError: of the stage that is short of most.
        """
        short = []
        for s, (run, device, held) in enumerate(zip(layers, chain, in_flight, strict=True)):
            needs = self.memory(run, held, device, pipelines)
            short.append((needs.total - device.memory_bytes, -s, run, device, needs))
        missing, minus_s, run, device, needs = max(short, key=lambda x: x[:2])
        if missing > 0:
            raise DoesNotFitError(
                f"pipeline {pipeline} stage {-minus_s} (layers {run[0]}-{run[1] - 1}) on device "
                f"{device.id} needs {needs.describe()}, but the device has "
                f"{device.memory_bytes / 1e9:.2f} GB.",
                missing,
            )

    def most_in_flight(
        self, layers: tuple[int, int], device: Device, most: int, pipelines: int
    ) -> int:
        """How many microbatches (up to ``most``) the stage can hold; 0 if it doesn't fit."""
        return largest(
            lambda held: self.memory(layers, held, device, pipelines).total,
            device.memory_bytes,
            most,
        )

    def most_layers(
        self, stage: int, stages: int, in_flight: int, device: Device, pipelines: int
    ) -> int:
        """How many layers fit on ``device`` as stage ``stage`` of ``stages``; 0 if not even one."""
        layers = self.dims.layers

        def needs(count: int) -> int:
            first = 0 if stage == 0 else layers - count if stage == stages - 1 else 1
            return self.memory((first, first + count), in_flight, device, pipelines).total

        return largest(needs, device.memory_bytes, layers - stages + 1)

    def fits_any(self, device: Device) -> bool:
        """Whether ``device`` can hold at least one layer, of whichever stage."""
        layers = self.dims.layers
        runs = {(i, i + 1) for i in (0, layers // 2, layers - 1)}
        return any(self.most_in_flight(run, device, 1, 1) for run in runs)
