"""The tokens of a stage that needs them: the first one's inputs, the last one's targets."""

from __future__ import annotations

import socket

import torch

from ray_train_geo.data.dataset import TokenDataset, open_dataset
from ray_train_geo.data.order import SampleOrder
from ray_train_geo.errors import DataError
from ray_train_geo.model.catalog import ModelDims
from ray_train_geo.spec import JobSpec
from ray_train_geo.training.assignment import Assignment
from ray_train_geo.training.executor import Batches

__all__ = ["BatchSource"]


class BatchSource:
    """Opens a job's data once, for all generations of a worker."""

    def __init__(self) -> None:
        self._data: TokenDataset | None = None

    def open(self, job: JobSpec, dims: ModelDims, fingerprint: str | None) -> TokenDataset:
        """The job's data.

        Args:
            fingerprint: what it must have, where that is known.

        Raises:
            DataError: it can't be read here, or is not what the head node has.
        """
        if self._data is None:
            data = open_dataset(job.data, job.training.seq_len)
            data.require_vocab(dims.vocab_size)
            if fingerprint is not None and data.fingerprint != fingerprint:
                raise DataError(
                    f"data.path {job.data.path} holds other tokens on {socket.gethostname()} than "
                    "on the head node; every node must see the same data"
                )
            self._data = data
        return self._data

    def batches(self, assignment: Assignment, device: torch.device) -> Batches:
        """The batches of ``assignment``'s job, on ``device``; raises as :meth:`open`."""
        training = assignment.job.training
        data = self.open(assignment.job, assignment.dims, assignment.data_fingerprint)
        order = SampleOrder(
            seed=training.seed,
            samples=data.samples,
            global_batch=training.global_batch,
            microbatch=training.microbatch,
        )

        def batches(step: int, microbatch: int) -> tuple[torch.Tensor, torch.Tensor]:
            inputs, targets = data.batch(order.indices(step, microbatch))
            return torch.from_numpy(inputs).to(device), torch.from_numpy(targets).to(device)

        return batches
