"""A planning problem: topology, job and wishes, and the questions that all of the planner asks.

Answers are remembered: a plan of a thousand devices has few kinds of stages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from ray_train_geo.cluster.topology import Device, Topology
from ray_train_geo.errors import PlanError
from ray_train_geo.model.catalog import ModelDims
from ray_train_geo.planning.codecs import wire_bytes
from ray_train_geo.planning.cost import embedding_s, head_s, layer_s
from ray_train_geo.planning.link_table import LinkTable
from ray_train_geo.planning.memory import MemoryEstimate, is_cpu, largest, stage_memory_bytes
from ray_train_geo.planning.plan import Objective
from ray_train_geo.spec import GradientSyncName, JobSpec

__all__ = ["DoesNotFitError", "PlanOptions", "Problem"]

_ALL_MODES: tuple[GradientSyncName, ...] = ("allreduce", "sharded_ps", "central_ps")


_MOVES_PER_DEVICE = 40
_MOST_MOVES = 4000


class DoesNotFitError(PlanError):
    """A stage is too large for its device, by ``missing_bytes``."""

    def __init__(self, message: str, missing_bytes: int) -> None:
        super().__init__(message)
        self.missing_bytes = missing_bytes


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """What is wished of a plan beyond the job.

    Args:
        objective: what the search minimises.
        codecs: those that a hop may use (``planning.codecs``); what carries the messages must know
            them.
        moves: how many changes of a plan the local search tries; 0 leaves the best construction,
            None is as many as the number of devices asks for.
        seed: of the local search.
        max_dollars_per_hour: all used devices together may cost no more.
    """

    objective: Objective = "step-time"
    codecs: tuple[str, ...] = ("none",)
    moves: int | None = None
    seed: int = 0
    max_dollars_per_hour: float | None = None

    def moves_for(self, devices: int) -> int:
        """How many moves, for so many devices."""
        return min(_MOVES_PER_DEVICE * devices, _MOST_MOVES) if self.moves is None else self.moves


@dataclass(frozen=True)
class Problem:
    """What is planned.  Its devices are numbered in the topology's order, as in ``table``."""

    topology: Topology
    job: JobSpec
    dims: ModelDims
    options: PlanOptions = PlanOptions()
    _estimates: dict[tuple[int, bool, bool, int, bool, bool], MemoryEstimate] = field(
        default_factory=dict, repr=False
    )
    _most_layers: dict[tuple[bool, bool, int, bool, int, int, bool], int] = field(
        default_factory=dict, repr=False
    )
    _in_flight: dict[tuple[int, bool, bool, bool, int, int, bool], int] = field(
        default_factory=dict, repr=False
    )

    @classmethod
    def of(
        cls,
        topology: Topology,
        job: JobSpec,
        vocab_size: int,
        options: PlanOptions | None = None,
    ) -> Problem:
        # In an order of its own: plans must not depend on how a topology is listed.
        devices = sorted(topology.devices, key=lambda d: (d.region, d.node, d.id))
        at_precision = topology.with_devices(devices).at_precision(job.training.precision)
        return cls(at_precision, job, job.dims(vocab_size), options or PlanOptions())

    @cached_property
    def devices(self) -> Mapping[str, Device]:
        return {device.id: device for device in self.topology.devices}

    @cached_property
    def table(self) -> LinkTable:
        return LinkTable.of(self.topology)

    @property
    def gpipe(self) -> bool:
        return self.job.parallelism.schedule == "gpipe"

    @cached_property
    def modes(self) -> tuple[GradientSyncName, ...]:
        """The gradient-sync modes that the job allows."""
        choice = self.job.parallelism.gradient_sync
        return _ALL_MODES if choice == "auto" else (choice,)

    @cached_property
    def work(self) -> StageWork:
        return StageWork.of(self)

    @cached_property
    def kinds(self) -> tuple[int, ...]:
        """``[devices]``; equal numbers for devices that compute and hold the same."""
        numbers: dict[tuple[float, int, bool], int] = {}
        return tuple(
            numbers.setdefault((d.flops_per_s, d.memory_bytes, is_cpu(d)), len(numbers))
            for d in self.topology.devices
        )

    @cached_property
    def twins(self) -> tuple[int, ...]:
        """``[devices]``; devices with equal numbers can stand for each other.

        They are of one kind and one price, and on one node or alone on nodes with equal links.
        """
        table = self.table
        alone = np.bincount(table.node)[table.node] == 1
        numbers: dict[tuple[object, ...], int] = {}
        found = []
        for d, device in enumerate(self.topology.devices):
            node = table.node[d]
            place: tuple[object, ...] = (int(node),)
            if alone[d]:
                nic = table.out_seconds_per_byte[node], table.in_seconds_per_byte[node]
                place = int(table.site[d]), *map(float, nic)
            key = self.kinds[d], device.price_per_hour, place
            found.append(numbers.setdefault(key, len(numbers)))
        return tuple(found)

    @property
    def message_elements(self) -> int:
        """Values in one message between stages: the hidden state of a microbatch."""
        training = self.job.training
        return training.microbatch * training.seq_len * self.dims.dim

    @property
    def message_bytes(self) -> float:
        """Bytes of one message with the smallest codec that may be used."""
        precision = self.job.training.precision
        return min(wire_bytes(c, self.message_elements, precision) for c in self.options.codecs)

    @cached_property
    def _links(self) -> _Links:
        return _Links.of(self.table)

    def hop(self, source: int, target: int) -> tuple[float, float]:
        """``(latency_s, seconds_per_byte)`` of a flow that has NICs and uplinks to itself."""
        links = self._links
        a, b = links.node[source], links.node[target]
        if a == b:
            return links.local[a]
        latency, per_byte = links.between[links.site[source]][links.site[target]]
        uplink = links.uplink[links.region[source]][links.region[target]]
        return latency, max(per_byte, links.out[a], links.into[b], uplink)

    def busiest_seconds_per_byte(self, source: int, target: int, pipelines: int) -> float:
        """What a flow gets when all that may share its NICs and uplink are as busy as it is."""
        links = self._links
        a, b = links.node[source], links.node[target]
        alone = self.hop(source, target)[1]
        if a == b:
            return alone
        uplink = links.uplink[links.region[source]][links.region[target]]
        nics = max(links.out[a] * links.devices[a], links.into[b] * links.devices[b])
        return max(alone, nics, uplink * pipelines)

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
        first, last = layers[0] == 0, layers[1] == self.dims.layers
        key = (
            layers[1] - layers[0],
            first,
            last,
            is_cpu(device),
            device.memory_bytes,
            most,
            pipelines > 1,
        )
        if key not in self._in_flight:
            self._in_flight[key] = largest(
                lambda held: self.memory(layers, held, device, pipelines).total,
                device.memory_bytes,
                most,
            )
        return self._in_flight[key]

    def most_layers(
        self, stage: int, stages: int, in_flight: int, device: Device, pipelines: int
    ) -> int:
        """How many layers fit on ``device`` as stage ``stage`` of ``stages``; 0 if not even one."""
        layers = self.dims.layers
        first, last = stage == 0, stage == stages - 1
        most = layers - stages + 1
        key = first, last, in_flight, is_cpu(device), device.memory_bytes, most, pipelines > 1
        if key not in self._most_layers:

            def needs(count: int) -> int:
                begin = 0 if first else layers - count if last else 1
                return self.memory((begin, begin + count), in_flight, device, pipelines).total

            self._most_layers[key] = largest(needs, device.memory_bytes, most)
        return self._most_layers[key]

    def fits_any(self, device: Device) -> bool:
        """Whether ``device`` can hold at least one layer, of whichever stage."""
        layers = self.dims.layers
        runs = {(i, i + 1) for i in (0, layers // 2, layers - 1)}
        return any(self.most_in_flight(run, device, 1, 1) for run in runs)


@dataclass(frozen=True, slots=True)
class StageWork:
    """Seconds of one microbatch on each device: a stage is so many layers, and perhaps the ends.

    All are ``[devices]``: forward and backward of one layer, of the embedding, of the head.
    """

    layer: tuple[tuple[float, float], ...]
    embedding: tuple[tuple[float, float], ...]
    head: tuple[tuple[float, float], ...]

    @classmethod
    def of(cls, problem: Problem) -> StageWork:
        dims, training, devices = problem.dims, problem.job.training, problem.topology.devices
        return cls(
            tuple(layer_s(dims, training, d) for d in devices),
            tuple(embedding_s(dims, training, d) for d in devices),
            tuple(head_s(dims, training, d) for d in devices),
        )


@dataclass(frozen=True, slots=True)
class _Links:
    """A link table as plain lists, which answer one question at a time faster than arrays."""

    node: list[int]
    site: list[int]
    region: list[int]
    devices: list[int]  # on each node
    local: list[tuple[float, float]]
    between: list[list[tuple[float, float]]]
    out: list[float]
    into: list[float]
    uplink: list[list[float]]

    @classmethod
    def of(cls, table: LinkTable) -> _Links:
        latency, per_byte = table.latency_s.tolist(), table.seconds_per_byte.tolist()
        return cls(
            node=table.node.tolist(),
            site=table.site.tolist(),
            region=table.region.tolist(),
            devices=np.bincount(table.node).tolist(),
            local=list(
                zip(
                    table.local_latency_s.tolist(),
                    table.local_seconds_per_byte.tolist(),
                    strict=True,
                )
            ),
            between=[list(zip(*rows, strict=True)) for rows in zip(latency, per_byte, strict=True)],
            out=table.out_seconds_per_byte.tolist(),
            into=table.in_seconds_per_byte.tolist(),
            uplink=table.uplink_seconds_per_byte.tolist(),
        )
