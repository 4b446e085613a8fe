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
from ray_train_geo.planning.codecs import gradient_bytes, wire_bytes
from ray_train_geo.planning.cost import StageWork
from ray_train_geo.planning.link_table import LinkTable
from ray_train_geo.planning.memory import MemoryEstimate, is_cpu, largest, stage_memory_bytes
from ray_train_geo.planning.plan import Objective
from ray_train_geo.spec import GradientSyncName, JobSpec, ScheduleName

__all__ = ["DoesNotFitError", "PlanOptions", "Problem"]

_ALL_MODES: tuple[GradientSyncName, ...] = ("allreduce", "sharded_ps", "central_ps")


_UNEQUAL_NICS = 1.25
"""Measured rates differ by less by chance."""
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
        codecs: those that a hop may use (``planning.codecs``); those that the job allows if empty.
        moves: how many changes of a plan the local search tries; 0 leaves the best construction,
            None is as many as the number of devices asks for.
        seed: of the local search.
        max_dollars_per_hour: all used devices together may cost no more.
    """

    objective: Objective = "step-time"
    codecs: tuple[str, ...] = ()
    moves: int | None = None
    seed: int = 0
    max_dollars_per_hour: float | None = None

    def moves_for(self, devices: int) -> int:
        """How many moves, for so many devices."""
        return min(_MOVES_PER_DEVICE * devices, _MOST_MOVES) if self.moves is None else self.moves


@dataclass(frozen=True)
class Problem:
    """What is planned.  Its devices are numbered in the topology's order, as in ``table``.

    Args:
        gradient_part: of the gradients' bytes that count; bounds may have to look at less.
    """

    topology: Topology
    job: JobSpec
    dims: ModelDims
    options: PlanOptions = PlanOptions()
    gradient_part: float = 1.0
    _estimates: dict[tuple[int, bool, bool, int, bool, bool, int], MemoryEstimate] = field(
        default_factory=dict, repr=False
    )
    _most_layers: dict[tuple[bool, bool, int, bool, int, int, bool], int] = field(
        default_factory=dict, repr=False
    )
    _in_flight: dict[tuple[int, bool, bool, bool, int, int, bool, int], int] = field(
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
    def codecs(self) -> tuple[str, ...]:
        """Those that a hop may use."""
        return self.options.codecs or self.job.codecs.of_hops

    @cached_property
    def devices(self) -> Mapping[str, Device]:
        return {device.id: device for device in self.topology.devices}

    @cached_property
    def table(self) -> LinkTable:
        return LinkTable.of(self.topology)

    @cached_property
    def schedules(self) -> tuple[ScheduleName, ...]:
        """Those that the job allows; the first is the one that the search is about."""
        choice = self.job.parallelism.schedule
        if choice != "auto":
            return (choice,)
        return ("1f1b",) if self.job.training.compile else ("1f1b", "zero-bubble")

    @property
    def gpipe(self) -> bool:
        return self.schedules[0] == "gpipe"

    @property
    def zero_bubble(self) -> bool:
        """Whether the search is about backwards in two parts."""
        return self.schedules[0] == "zero-bubble"

    @property
    def may_split(self) -> bool:
        """Whether a plan may have backwards in two parts."""
        return "zero-bubble" in self.schedules

    @cached_property
    def modes(self) -> tuple[GradientSyncName, ...]:
        """The gradient-sync modes that the job allows."""
        choice = self.job.parallelism.gradient_sync
        if choice != "auto":
            return (choice,)
        # Encoded gradients are summed at one place each.
        return _ALL_MODES if self.job.codecs.gradients == "none" else _ALL_MODES[1:]

    @cached_property
    def late_modes(self) -> tuple[GradientSyncName, ...]:
        """Further modes that the job allows; the planner tries them on plans that are finished.

        Sums of sites before those between them pay where what joins the sites is shared.
        """
        job = self.job
        if job.parallelism.gradient_sync != "auto" or job.codecs.gradients == "powersgd":
            return ()
        shared = bool(self.table.uplink_seconds_per_byte.any())
        return ("hierarchical", "tree") if shared else ("tree",)

    @cached_property
    def shards_by_speed(self) -> bool:
        """Whether holders of a sharded PS may make unequal shards: where NICs are unequal."""
        allowed = "sharded_ps" in self.modes and self.job.codecs.gradients != "powersgd"
        nics = np.stack([self.table.out_seconds_per_byte, self.table.in_seconds_per_byte])
        return allowed and bool((nics.max(axis=1) > _UNEQUAL_NICS * nics.min(axis=1)).any())

    @cached_property
    def gradient_bytes(self) -> float:
        """Bytes of a message of the gradient sync for each gradient in it."""
        return self.gradient_part * gradient_bytes(self.job.codecs, self.dims)

    @cached_property
    def _memory_copies(self) -> bool:
        """Whether workers keep copies; that a plan may use one node alone is not looked at."""
        nodes = {device.node for device in self.topology.devices}
        return self.job.failure.memory_copies != 0 and len(nodes) > 1

    @cached_property
    def work(self) -> StageWork:
        return StageWork.of(self.dims, self.job.training, self.topology.devices)

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
        return min(wire_bytes(c, self.message_elements, precision) for c in self.codecs)

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
        self,
        layers: tuple[int, int],
        in_flight: int,
        device: Device,
        pipelines: int,
        deferred: int | None = None,
    ) -> MemoryEstimate:
        """What the stage of ``layers`` needs on ``device`` in a plan of ``pipelines``.

        Args:
            deferred: as :func:`stage_memory_bytes`; by default the least that the schedule needs.
        """
        later = int(self.zero_bubble) if deferred is None else deferred
        first, last = layers[0] == 0, layers[1] == self.dims.layers
        # Gradients are exchanged among pipelines, and between two holders of a tied matrix.
        synced = pipelines > 1 or (self.dims.tied_embeddings and first != last)
        key = layers[1] - layers[0], first, last, in_flight, is_cpu(device), synced, later
        if key not in self._estimates:
            self._estimates[key] = stage_memory_bytes(
                self.dims,
                self.job.training,
                layers,
                in_flight,
                cpu=is_cpu(device),
                deferred=later,
                sync_bucket_bytes=self.job.parallelism.bucket_bytes if synced else 0,
                feeds_back=synced and self.job.codecs.feeds_back,
                memory_copies=self._memory_copies,
                local_sgd=self.job.local_sgd is not None,
                delayed=bool(self.job.parallelism.delay_steps),
            )
        return self._estimates[key]

    def check_memory(
        self,
        pipeline: int,
        layers: Sequence[tuple[int, int]],
        chain: Sequence[Device],
        in_flight: Sequence[int],
        pipelines: int,
        deferred: Sequence[int] | None = None,
    ) -> None:
        """Check all stages of pipeline number ``pipeline``; ``deferred`` as :meth:`memory`.

        Raises:
            DoesNotFitError: of the stage that is short of most.
        """
        short = []
        for s, (run, device, held) in enumerate(zip(layers, chain, in_flight, strict=True)):
            later = None if deferred is None else deferred[s]
            needs = self.memory(run, held, device, pipelines, later)
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
        self,
        layers: tuple[int, int],
        device: Device,
        most: int,
        pipelines: int,
        deferred: int | None = None,
    ) -> int:
        """How many microbatches (up to ``most``) the stage can hold; 0 if it doesn't fit.

        Args:
            deferred: as :meth:`memory`.
        """
        later = int(self.zero_bubble) if deferred is None else deferred
        first, last = layers[0] == 0, layers[1] == self.dims.layers
        key = (
            layers[1] - layers[0],
            first,
            last,
            is_cpu(device),
            device.memory_bytes,
            most,
            pipelines > 1,
            later,
        )
        if key not in self._in_flight:
            self._in_flight[key] = largest(
                lambda held: self.memory(layers, held, device, pipelines, later).total,
                device.memory_bytes,
                most,
            )
        return self._in_flight[key]

    def most_deferred(
        self, layers: tuple[int, int], device: Device, in_flight: int, most: int, pipelines: int
    ) -> int:
        """Of how many microbatches the stage can put off W, beside ``in_flight``; at least 0."""
        room = largest(
            lambda later: self.memory(layers, in_flight, device, pipelines, later).total,
            device.memory_bytes,
            most,
        )
        return max(0, room - 1)  # the one whose B has just ended is beside those

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
