"""One question to a system's model: this workload on these devices, with these settings."""

from __future__ import annotations

from dataclasses import dataclass

from ray_train_geo.cluster.topology import Topology
from ray_train_geo.errors import SpecError
from ray_train_geo.model.catalog import (
    BYTES_PER_ELEMENT,
    ModelDims,
    boundary_bytes,
    head_flops,
    layer_flops,
)
from ray_train_geo.planning.link_table import LinkTable
from ray_train_geo.systems.constants import Constants
from ray_train_geo.systems.settings import Values
from ray_train_geo.systems.simulated import TracedPipeline

__all__ = ["Case", "Outcome"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a system's model answers; the fields are ``Simulated``'s."""

    breakdown: dict[str, float]
    trace: tuple[TracedPipeline, ...] = ()
    sync_s: tuple[float, float] | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Case:
    """One question.

    Args:
        scenario: the name; empty for a topology of the user's own.
        nominal: the cluster as a planner knows it.
        topology, table: as it behaves.
        collectives: as collectives see it.
        trace: whether the answer must have one.
    """

    scenario: str
    nominal: Topology
    topology: Topology
    table: LinkTable
    collectives: LinkTable
    model: str
    dims: ModelDims
    global_batch: int
    constants: Constants
    values: Values
    trace: bool = False

    @property
    def seq_len(self) -> int:
        return self.dims.max_seq_len

    @property
    def precision(self) -> str:
        return self.values.text("precision")

    @property
    def microbatch(self) -> int:
        return self.values.whole("microbatch")

    @property
    def element_bytes(self) -> int:
        """Of a weight, and of its gradient on the wire."""
        return BYTES_PER_ELEMENT[self.precision]

    @property
    def message_bytes(self) -> int:
        """Of one hop."""
        return boundary_bytes(self.dims, self.seq_len, self.microbatch, self.precision)

    def grid(self, tensor: int = 1) -> tuple[int, int]:
        """(stages, replicas) of a plan that uses all devices.

        Raises:
            SpecError: they do not make up the device count, or the batch does not divide.
        """
        devices = len(self.topology.devices)
        stages, replicas = self.values.number("stages"), self.values.number("replicas")
        if stages is None and replicas is None:
            replicas = max(1, devices // (tensor * 8))
        if stages is None:
            stages = devices // (tensor * (replicas or 1))
        if replicas is None:
            replicas = devices // (tensor * stages)
        if tensor * stages * replicas != devices or not stages * replicas:
            fits = ", ".join(
                f"{p} x {devices // tensor // p}"
                for p in range(1, devices // tensor + 1)
                if devices % (tensor * p) == 0
            )
            shape = f"{stages} stages x {replicas} replicas"
            if tensor > 1:
                shape = f"{tensor} tensor-parallel x {shape}"
            raise SpecError(
                f"{shape} are {tensor * stages * replicas} devices, and there are {devices}; "
                + (
                    f"stages x replicas can be {fits}"
                    if fits
                    else f"choose tensor to divide {devices}"
                )
            )
        if stages > self.dims.layers:
            raise SpecError(
                f"{stages} stages, but {self.model} has {self.dims.layers} layers: use fewer stages"
            )
        self.microbatches(replicas)
        return stages, replicas

    def microbatches(self, replicas: int) -> int:
        """Of each replica.

        Raises:
            SpecError: they are not equal and whole.
        """
        each = replicas * self.microbatch
        if self.global_batch % each:
            below = self.global_batch // each * each
            raise SpecError(
                f"a global batch of {self.global_batch} does not divide into {replicas} replicas "
                f"with microbatches of {self.microbatch}: use a multiple of {each}, such as "
                f"{below or each} or {below + each}"
            )
        return self.global_batch // each

    def rates(self, devices: list[int]) -> list[float]:
        """FLOP/s of devices, by number."""
        return [self.topology.devices[d].at_precision(self.precision).flops_per_s for d in devices]

    def stage_s(
        self, rate: float, layers: int, *, head: bool = False, shards: int = 1
    ) -> tuple[float, float]:
        """Seconds of one microbatch's forward and backward.

        Args:
            rate: FLOP/s.
            shards: devices that share the work.
        """
        forward = layers * layer_flops(self.dims, self.seq_len, self.microbatch)
        backward = (3 if self.values.flag("recompute") else 2) * forward
        if head:
            extra = head_flops(self.dims, self.seq_len, self.microbatch)
            forward, backward = forward + extra, backward + 2 * extra
        return forward / (rate * shards), backward / (rate * shards)
