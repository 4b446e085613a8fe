"""What travels between a coordinator and its workers: orders one way, reports the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from ray_train_geo.errors import StorageError
from ray_train_geo.model.catalog import ModelDims
from ray_train_geo.planning.islands import Island, islands
from ray_train_geo.planning.plan import Plan, Role
from ray_train_geo.spec import JobSpec
from ray_train_geo.training.checkpoint import CheckpointPart
from ray_train_geo.training.copies import CopyDuty
from ray_train_geo.training.manifest import Manifest
from ray_train_geo.training.precision import LossScale
from ray_train_geo.training.standing import StepRecord
from ray_train_geo.transport.state_stream import Address

__all__ = ["Assignment", "Handover", "Outcome", "Reporter", "Start", "StepRecord"]


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
class Handover:
    """State that the workers of an earlier generation have in memory.

    Args:
        step: the committed step that all go on from.
        updates: AdamW updates so far.
        sources: where this worker gets the weights (and all that goes with them) that it does not
            have itself, or has of another island.
        restarts: under local SGD, those of ``sources`` that begin at the global parameters.
        bequests: of each weight, residuals that become this worker's: where they are, and whose
            they were, if not that worker's own.
    """

    step: int
    updates: int
    loss_scale: LossScale
    sources: Mapping[str, Address]
    restarts: frozenset[str] = frozenset()
    bequests: Mapping[str, Sequence[tuple[Address, str | None]]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Assignment:
    """What a worker is told: its role in a plan, and all that it needs to play it.

    Args:
        start: None: initial weights, at step 0.
        copies: its duty, if this generation keeps in-memory copies.
        copies_to: the state server of its duty's peer.
        spares_to: the state server of who gets a copy of this worker's residuals after each step.
        flows: TCP flows that carry a group, by name, where it is more than one.
    """

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
    start: Start | Handover | None = None
    copies: CopyDuty | None = None
    copies_to: Address | None = None
    spares_to: Address | None = None
    flows: Mapping[str, int] = field(default_factory=dict)

    @property
    def role(self) -> Role:
        return next(role for role in self.plan.roles() if role.rank == self.rank)

    @property
    def device(self) -> str:
        return self.plan.stage(self.role).device

    @property
    def island(self) -> Island | None:
        """Under local SGD, the island that this worker is on."""
        local_sgd = self.job.local_sgd
        if local_sgd is None:
            return None
        among = islands(self.plan, local_sgd.across)
        return next(island for island in among if self.rank in island.ranks)


@dataclass(frozen=True, slots=True)
class Outcome:
    """Why a worker's run of steps ended, after which step (the same on every worker).

    Args:
        interrupted: before the last step.
        paused: for a new generation, not to stop: nothing was saved.
    """

    step: int
    interrupted: bool
    updates: int
    loss_scale: LossScale = field(default_factory=LossScale)
    paused: bool = False


class Reporter(Protocol):
    """Whom a worker tells what has happened; calls return at once."""

    def committed(self, record: StepRecord) -> None:
        """A step was committed (rank 0 only)."""

    def part_written(self, step: int, part: CheckpointPart, state: Mapping[str, Any]) -> None:
        """This worker's part of the checkpoint of ``step`` is on storage."""

    def part_failed(self, step: int, rank: int, error: StorageError) -> None:
        """It could not be written."""
