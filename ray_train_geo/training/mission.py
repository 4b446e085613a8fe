"""What a driver hands to a coordinator, and what it gets back (values that travel)."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ray_train_geo.errors import GeoError, StorageError
from ray_train_geo.model.catalog import ModelDims, total_parameters
from ray_train_geo.spec import JobSpec
from ray_train_geo.training.checkpoint import CheckpointStore

__all__ = ["Mission", "Phase", "Progress", "Summary", "check_space", "checkpoint_root"]

Phase = Literal["starting", "training", "waiting", "stopping", "finished", "stopped", "failed"]

_CHECKPOINT_BYTES_PER_PARAMETER = 12
_CHECKPOINT_SLACK = 1.05


@dataclass(frozen=True, slots=True)
class Mission:
    """A job that was checked, and how far to take it.

    Args:
        vocab_size: the tokenizer's, in tokens.
        bytes_per_token: of the data's text, where known.
        resume: a checkpoint to go on from.
        until: last step of this session; the job's own number of steps at most.
        session: no two have the same.
    """

    job: JobSpec
    vocab_size: int
    data_fingerprint: str
    bytes_per_token: float | None
    resume: str | None = None
    until: int | None = None
    session: str = field(default_factory=lambda: uuid.uuid4().hex[:12])

    @property
    def dims(self) -> ModelDims:
        return self.job.dims(self.vocab_size)

    @property
    def last_step(self) -> int:
        steps = self.job.training.steps
        return steps if self.until is None else min(self.until, steps)


@dataclass(frozen=True, slots=True)
class Summary:
    """How a run ended."""

    phase: Phase
    step: int
    checkpoint: str | None
    path: str
    error: GeoError | None = None


@dataclass(frozen=True, slots=True)
class Progress:
    """What a follower has not seen yet."""

    phase: Phase
    records: list[dict[str, Any]]
    events: list[dict[str, Any]]
    summary: Summary | None


def checkpoint_root(job: JobSpec) -> str:
    """Where the job's checkpoints are: in the run directory, or in storage under its name."""
    if job.checkpoint.storage_path is None:
        return str(job.run.directory / "checkpoints")
    path = job.checkpoint.storage_path.rstrip("/")
    if "://" not in path:
        path = str(Path(path).expanduser().absolute())
    return f"{path}/{job.run.name}"


def check_space(dims: ModelDims, keep: int, store: CheckpointStore) -> None:
    """Refuse a run whose checkpoints can't fit: ``keep`` of them, and the one being written.

    Raises:
        StorageError: with what is needed and what is there.
    """
    each = int(total_parameters(dims) * _CHECKPOINT_BYTES_PER_PARAMETER * _CHECKPOINT_SLACK)
    needed = each * max(1, keep + 1 - len(store.complete()))
    free = store.free_bytes()
    if free is not None and free < needed:
        raise StorageError(
            f"checkpoint storage {store.root} has {free / 2**20:,.1f} MiB free, but {keep} "
            f"checkpoints and the one being written need {needed / 2**20:,.1f} MiB more "
            f"({each / 2**20:,.1f} MiB each); free some space, lower checkpoint.keep, or choose "
            "another checkpoint.storage_path"
        )
