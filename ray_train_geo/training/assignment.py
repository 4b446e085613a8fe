"""What travels between a coordinator and its workers: orders one way, reports the other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from ray_train_geo.errors import StorageError
from ray_train_geo.model.catalog import ModelDims
from ray_train_geo.planning.plan import Plan, Role
from ray_train_geo.spec import JobSpec
from ray_train_geo.training.checkpoint import CheckpointPart
from ray_train_geo.training.manifest import Manifest
from ray_train_geo.training.precision import LossScale

__all__ = ["Assignment", "Outcome", "Reporter", "Start", "StepRecord"]


@dataclass(frozen=True, slots=True)
class Start:
    """Where a generation's state comes from.

    Args:
        location: a checkpoint.
        weights_only: take the weights, and begin at step 1 with fresh moments.
    """

    location: str
    manifest: Manifest
    weights_only: bool = False


@dataclass(frozen=True, slots=True)
class Assignment:
    """What a worker is told: its role in a plan, and all that it needs to play it."""

    job: JobSpec
    dims: ModelDims
    plan: Plan
    rank: int
    generation: int
    hostname: str
    deadline_s: float
    checkpoint_root: str
    transport: Literal["gloo", "nccl"] = "gloo"
    data_fingerprint: str | None = None
    start: Start | None = None

    @property
    def role(self) -> Role:
        return next(role for role in self.plan.roles() if role.rank == self.rank)


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One committed step, the same on every worker but for ``time`` and ``step_s``.

    Args:
        loss: mean over all tokens of the step, in nats.
        grad_norm: global L2 norm before clipping; not finite if the step overflowed.
    """

    step: int
    time: float
    loss: float
    grad_norm: float
    learning_rate: float
    loss_scale: float
    skipped: bool
    step_s: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """Why a worker's run of steps ended, after which step (the same on every worker)."""

    step: int
    interrupted: bool
    updates: int
    loss_scale: LossScale = field(default_factory=LossScale)


class Reporter(Protocol):
    """Whom a worker tells what has happened; calls return at once."""

    def committed(self, record: StepRecord) -> None:
        """A step was committed (rank 0 only)."""

    def part_written(self, step: int, part: CheckpointPart, state: Mapping[str, Any]) -> None:
        """This worker's part of the checkpoint of ``step`` is on storage."""

    def part_failed(self, step: int, rank: int, error: StorageError) -> None:
        """It could not be written."""
