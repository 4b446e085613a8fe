"""One worker's part of each checkpoint: copied between two steps, written while others run."""

from __future__ import annotations

import zlib
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from ray_train_geo.errors import StorageError
from ray_train_geo.observe.phases import PhasePage
from ray_train_geo.training.assignment import Assignment, Reporter
from ray_train_geo.training.buckets import holders_of
from ray_train_geo.training.checkpoint import CheckpointStore, get_ready, write_part
from ray_train_geo.training.outer import OUTER, OUTER_TOKENS
from ray_train_geo.training.precision import LossScale
from ray_train_geo.training.residuals import saved_residual
from ray_train_geo.training.state import StageState

__all__ = ["Saver"]


class Saver:
    """Writes checkpoints of one generation.

    Args:
        step: the newest step that is on storage already.
        phases: is told when something is being written.
    """

    def __init__(
        self,
        assignment: Assignment,
        state: StageState,
        reporter: Reporter,
        step: int | None,
        phases: PhasePage | None = None,
    ) -> None:
        self._assignment = assignment
        self._state = state
        self._reporter = reporter
        self._saved = step
        self._phases = phases
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None
        self._writer.submit(get_ready)

    def save(self, step: int, scale: LossScale) -> None:
        """Copy this worker's share of the state after ``step``, and write it in the background."""
        if step == self._saved:
            return
        self.finish()  # at most one copy in memory
        a = self._assignment
        share = {
            name: tensor.to("cpu", copy=True)
            for name, tensor in (self._state.tensors(self._share()) | self._residuals()).items()
            if name.partition(".")[0] not in (OUTER, OUTER_TOKENS)  # everything is merged now
        }
        state = {
            "updates": self._state.updates,
            "loss_scale": scale.factor,
            "good_steps": scale.good_steps,
        }
        location = CheckpointStore(a.checkpoint_root).writing(step, a.generation)

        def write() -> None:
            self._tell(saving=True)
            try:
                part = write_part(location, a.rank, share)
            except StorageError as e:
                self._reporter.part_failed(step, a.rank, e)
            else:
                self._reporter.part_written(step, part, state)
            finally:
                self._tell(saving=False)

        self._saved = step
        self._writing = self._writer.submit(write)

    def _tell(self, saving: bool) -> None:
        if self._phases is not None:
            self._phases.saving(saving)

    def _residuals(self) -> dict[str, torch.Tensor]:
        """This worker's own, named so that those of a weight's other holders have other names."""
        if self._state.residuals is None:
            return {}
        found = self._state.residuals.tensors()
        return {saved_residual(name, self._assignment.rank): t for name, t in found.items()}

    def _share(self) -> list[str]:
        """Weights that this worker saves: those of each bucket are spread over its holders."""
        a = self._assignment
        names = []
        for name in self._state.weights:
            holders = holders_of(name, a.plan, a.dims)
            if holders[zlib.crc32(name.encode()) % len(holders)] == a.rank:
                names.append(name)
        return names

    def finish(self) -> None:
        """Wait until all is written."""
        if self._writing is not None:
            self._writing.result()
            self._writing = None

    def close(self) -> None:
        """What is being written is finished in the background."""
        self._writer.shutdown(wait=False)
