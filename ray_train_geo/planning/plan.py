"""The plan: which layers run on which device, in which pipeline, with how many microbatches.

A plan is a value (level 0).  It travels to the workers, into ``plan.json`` and into checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ray_train_geo.cluster.topology import Device

__all__ = ["PipelinePlan", "Plan", "Role", "StagePlan"]


@dataclass(frozen=True, slots=True)
class StagePlan:
    """A contiguous run of layers on one device.

    Args:
        layers: ``(first, last_exclusive)``, global layer ids.
        warmup: forwards before the first backward of 1F1B (``microbatches`` for GPipe).
        memory_bytes: predicted peak memory.
    """

    device: str
    layers: tuple[int, int]
    warmup: int
    memory_bytes: int = 0


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
class Plan:
    """Who computes what, and how long a step is predicted to take."""

    layers: int
    pipelines: tuple[PipelinePlan, ...]
    schedule: Literal["gpipe", "1f1b"]
    gradient_sync: Literal["allreduce", "sharded_ps", "central_ps"]
    devices: tuple[Device, ...]
    predicted_step_s: float
    lower_bound_s: float = 0.0
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

    def to_json(self) -> dict[str, Any]:
        """The form of ``plan.json`` and of ``ray-train-geo plan --json``."""
        gap = 0.0
        if self.lower_bound_s > 0:
            gap = self.predicted_step_s / self.lower_bound_s - 1
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
            "objective": self.predicted_step_s,
            "lower_bound": self.lower_bound_s,
            "gap": gap,
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
            lower_bound_s=data["lower_bound"],
            search_s=data["search_s"],
            notes=tuple(data["notes"]),
        )
