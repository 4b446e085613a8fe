"""What workers report, and how a report outlives the coordinator that it was meant for.

A report waits in its worker's outbox until a coordinator has heard it.  A coordinator that is
killed may have heard some and not have told: so its successor may hear them twice, and must not
mind.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError

from ray_train_geo.errors import StorageError
from ray_train_geo.training.assignment import StepRecord
from ray_train_geo.training.checkpoint import CheckpointPart

__all__ = ["Committed", "GenerationReporter", "Outbox", "PartFailed", "PartWritten", "Report"]

_ANSWER_S = 30.0
_RETRY_S = 0.1


@dataclass(frozen=True, slots=True)
class Committed:
    """A step was committed (rank 0 tells for all)."""

    generation: int
    record: StepRecord


@dataclass(frozen=True, slots=True)
class PartWritten:
    """A worker's part of the checkpoint of ``step`` is on storage."""

    generation: int
    step: int
    part: CheckpointPart
    state: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class PartFailed:
    """It could not be written."""

    generation: int
    step: int
    rank: int
    error: StorageError


Report = Committed | PartWritten | PartFailed


class Outbox:
    """Delivers reports in their order, in a thread of its own; safe from several threads.

    Args:
        coordinator: the actor that hears them, or its successor (its name stays the same).
    """

    def __init__(self, coordinator: Any) -> None:
        self._coordinator = coordinator
        self._changed = threading.Condition()
        self._waiting: list[Report] = []
        self._part: PartWritten | None = None
        threading.Thread(target=self._deliver, name="outbox", daemon=True).start()

    def put(self, report: Report) -> None:
        """Report, without waiting."""
        with self._changed:
            if isinstance(report, PartWritten):
                self._part = report
            self._waiting.append(report)
            self._changed.notify_all()

    def flush(self) -> None:
        """Wait until all has been heard."""
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting)

    def repeat_part(self) -> None:
        """Report the newest part of a checkpoint again: who had gathered the others is gone."""
        if self._part is not None:
            self.put(self._part)

    def _deliver(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting)
                batch = tuple(self._waiting)
            if not self._heard(batch):
                time.sleep(_RETRY_S)
                continue
            with self._changed:
                del self._waiting[: len(batch)]
                self._changed.notify_all()

    def _heard(self, batch: Sequence[Report]) -> bool:
        try:
            ray.get(self._coordinator.hear.remote(batch), timeout=_ANSWER_S)
        except RayError:  # it is dead, or being replaced
            return False
        return True


class GenerationReporter:
    """What a stage runtime of one generation reports to."""

    def __init__(self, outbox: Outbox, generation: int) -> None:
        self._outbox = outbox
        self._generation = generation

    def committed(self, record: StepRecord) -> None:
        self._outbox.put(Committed(self._generation, record))

    def part_written(self, step: int, part: CheckpointPart, state: Mapping[str, Any]) -> None:
        self._outbox.put(PartWritten(self._generation, step, part, dict(state)))

    def part_failed(self, step: int, rank: int, error: StorageError) -> None:
        self._outbox.put(PartFailed(self._generation, step, rank, error))
