"""The plan: which layers run on which device, in which pipeline, with how many microbatches.

A plan is a value (level 0).  It travels to the workers, into ``plan.json`` and into checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ray_train_geo.cluster.topology import Device
from ray_train_geo.spec import GradientSyncName, ScheduleName

__all__ = ["Certificate", "Objective", "PipelinePlan", "Plan", "Role", "StagePlan"]

Objective = Literal["step-time", "dollars", "dtfm"]


@dataclass(frozen=True, slots=True)
class StagePlan:
    """A contiguous run of layers on one device.

    Args:
        layers: ``(first, last_exclusive)``, global layer ids.
        warmup: forwards before the first backward (``microbatches`` for GPipe).
        memory_bytes: predicted peak memory.
        codec: of the messages on the hop to the next stage, activations and their gradients alike
            (a name in ``planning.codecs``); meaningless on the last stage.
        deferred: zero-bubble: microbatches whose weight gradients are put off at a time.
        shard: under sharded PS, how much of a sum this device makes, relative to the other holders
            of the same layers.
    """

    device: str
    layers: tuple[int, int]
    warmup: int
    memory_bytes: int = 0
    codec: str = "none"
    deferred: int = 0
    shard: float = 1.0


@dataclass(frozen=True, slots=True)
class PipelinePlan:
    """One data-parallel replica: a chain of stages that holds every layer once.

    Args:
        microbatches: how many of the step's microbatches this pipeline computes.
        first_microbatch: global index of the first of them; they are contiguous.
    """

    stages: tuple[StagePlan, ...]
    microbatches: int
    first_microbatch: int


@dataclass(frozen=True, slots=True)
class Role:
    """Where a worker stands in a plan.  ``rank`` counts pipeline by pipeline, stage by stage."""

    rank: int
    pipeline: int
    stage: int


@dataclass(frozen=True, slots=True)
class Certificate:
    """How good a plan is by the objective it was made for, and how good any plan could be.

    Args:
        objective: ``step-time`` (seconds), ``dollars`` (per million tokens) or ``dtfm`` (DT-FM's
            cost, in its own seconds).
        value: what this plan reaches.
        lower_bound: what no plan that the job allows can beat.
        argument: one sentence on what the bound rests on, and why it is weak where it is.
    """

    objective: Objective
    value: float
    lower_bound: float
    argument: str = ""

    @property
    def gap(self) -> float:
        """``value / lower_bound - 1``: 0 is proven best; infinite where the bound is 0."""
        if self.lower_bound <= 0:
            return 0.0 if self.value <= 0 else math.inf
        return max(0.0, self.value / self.lower_bound - 1)


@dataclass(frozen=True, slots=True)
class Plan:
    """Who computes what, and how long a step is predicted to take.

    Args:
        devices: those of the stages, in rank order.
        predicted_step_s: by the event engine.
        certificate: None where nobody asked how good the plan is.
        search_s: seconds that the search took; the caller has the clock.
    """

    layers: int
    pipelines: tuple[PipelinePlan, ...]
    schedule: ScheduleName
    gradient_sync: GradientSyncName
    devices: tuple[Device, ...]
    predicted_step_s: float
    certificate: Certificate | None = None
    search_s: float = 0.0
    notes: tuple[str, ...] = field(default=())

    def roles(self) -> Iterator[Role]:
        """All roles, in the order of their ranks."""
        rank = 0
        for p, pipeline in enumerate(self.pipelines):
            for s in range(len(pipeline.stages)):
                yield Role(rank, p, s)
                rank += 1

    @property
    def world_size(self) -> int:
        return sum(len(p.stages) for p in self.pipelines)

    def rank(self, pipeline: int, stage: int) -> int:
        return sum(len(p.stages) for p in self.pipelines[:pipeline]) + stage

    def stage(self, role: Role) -> StagePlan:
        return self.pipelines[role.pipeline].stages[role.stage]

    def holders(self, layer: int) -> tuple[int, ...]:
        """Ranks that hold ``layer``: its data-parallel group, one per pipeline, ascending."""
        return tuple(
            role.rank
            for role in self.roles()
            if self.stage(role).layers[0] <= layer < self.stage(role).layers[1]
        )

    def _repr_html_(self) -> str:
        """The map and a table, for notebooks."""
        from ray_train_geo.observe.plan_html import plan_html  # it draws: slow to import

        return plan_html(self)

    def to_json(self) -> dict[str, Any]:
        """The form of ``plan.json`` and of ``ray-train-geo plan --json``."""
        certificate = self.certificate or Certificate("step-time", self.predicted_step_s, 0.0)
        return {
            "devices": [
                {
                    "id": d.id,
                    "node": d.node,
                    "region": d.region,
                    "zone": d.zone,
                    "market_type": d.market_type,
                    "type": d.type,
                    "flops_per_s": d.flops_per_s,
                    "memory_bytes": d.memory_bytes,
                    "price_per_hour": d.price_per_hour,
                }
                for d in self.devices
            ],
            "pipelines": [
                {
                    "microbatches": p.microbatches,
                    "first_microbatch": p.first_microbatch,
                    "stages": [
                        {
                            "device": s.device,
                            "layers": list(s.layers),
                            "warmup": s.warmup,
                            "memory_bytes": s.memory_bytes,
                            "codec": s.codec,
                            "deferred": s.deferred,
                            "shard": s.shard,
                        }
                        for s in p.stages
                    ],
                }
                for p in self.pipelines
            ],
            "layers": self.layers,
            "schedule": self.schedule,
            "gradient_sync": self.gradient_sync,
            "predicted_step_s": self.predicted_step_s,
            "objective": certificate.value,
            "objective_name": certificate.objective,
            "lower_bound": certificate.lower_bound,
            "gap": None if math.isinf(certificate.gap) else certificate.gap,
            "bound_argument": certificate.argument,
            "search_s": self.search_s,
            "notes": list(self.notes),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Plan:
        """Read back what :meth:`to_json` wrote."""
        return cls(
            layers=data["layers"],
            pipelines=tuple(
                PipelinePlan(
                    stages=tuple(
                        StagePlan(
                            s["device"],
                            (s["layers"][0], s["layers"][1]),
                            s["warmup"],
                            s["memory_bytes"],
                            s.get("codec", "none"),
                            s.get("deferred", 0),
                            s.get("shard", 1.0),
                        )
                        for s in p["stages"]
                    ),
                    microbatches=p["microbatches"],
                    first_microbatch=p["first_microbatch"],
                )
                for p in data["pipelines"]
            ),
            schedule=data["schedule"],
            gradient_sync=data["gradient_sync"],
            devices=tuple(Device(**d) for d in data["devices"]),
            predicted_step_s=data["predicted_step_s"],
            certificate=Certificate(
                data["objective_name"],
                data["objective"],
                data["lower_bound"],
                data["bound_argument"],
            ),
            search_s=data["search_s"],
            notes=tuple(data["notes"]),
        )
