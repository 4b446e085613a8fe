"""The run that every plan must reproduce: one process, one plain loop, torch's own parts.

Nothing of the runtime is used but the model, the data order and the learning rate; gradients are
autograd's, clipping is ``clip_grad_norm_``, the update is ``torch.optim.AdamW``.
"""

from __future__ import annotations

import time

import torch

from ray_train_geo.data.dataset import open_dataset
from ray_train_geo.data.order import SampleOrder
from ray_train_geo.model.catalog import ModelDims
from ray_train_geo.model.dropout import dropout_key
from ray_train_geo.model.stage import build_stage, next_token_loss
from ray_train_geo.spec import JobSpec
from ray_train_geo.training.assignment import StepRecord
from ray_train_geo.training.optimizer import learning_rate

__all__ = ["run_reference"]


def run_reference(job: JobSpec, dims: ModelDims, until: int | None = None) -> list[StepRecord]:
    """Train ``job`` in fp32 in this process and return one record a step.

    Raises:
        DataError: the data can't be read.
    """
    training = job.training
    model = build_stage(dims, 0, dims.layers, seed=training.seed)
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": training.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=training.lr,
        betas=training.betas,
        eps=training.eps,
    )
    data = open_dataset(job.data, training.seq_len)
    order = SampleOrder(training.seed, data.samples, training.global_batch, training.microbatch)
    records = []
    for step in range(1, (until or training.steps) + 1):
        began, total = time.perf_counter(), 0.0
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, training)
        optimizer.zero_grad()
        for microbatch in range(training.total_microbatches):
            inputs, targets = (
                torch.from_numpy(a) for a in data.batch(order.indices(step, microbatch))
            )
            loss = next_token_loss(
                model(inputs, dropout_key(training.seed, step, microbatch)), targets
            )
            (loss / training.tokens_per_step).backward()
            total += float(loss.detach())
        largest = training.grad_clip or float("inf")
        norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), largest))
        optimizer.step()
        records.append(
            StepRecord(
                step=step,
                time=time.time(),
                loss=total / training.tokens_per_step,
                grad_norm=norm,
                learning_rate=learning_rate(step, training),
                loss_scale=1.0,
                skipped=False,
                step_s=time.perf_counter() - began,
            )
        )
    return records
