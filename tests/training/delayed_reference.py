"""Training with sums that come a step late, in one process and as plainly as it can be said."""

from __future__ import annotations

import torch

from ray_train_geo.data.dataset import open_dataset
from ray_train_geo.data.order import SampleOrder
from ray_train_geo.model.catalog import ModelDims
from ray_train_geo.model.dropout import dropout_key
from ray_train_geo.model.stage import build_stage, next_token_loss
from ray_train_geo.spec import JobSpec
from ray_train_geo.training.optimizer import learning_rate


def run_delayed(job: JobSpec, dims: ModelDims, until: int) -> list[float]:
    """Losses of all steps: step t is computed at what the steps up to t - 2 have made."""
    t = job.training
    newest = build_stage(dims, 0, dims.layers, seed=t.seed)
    behind = build_stage(dims, 0, dims.layers, seed=t.seed)
    groups = [
        {"params": [p for p in newest.parameters() if p.dim() >= 2]},
        {"params": [p for p in newest.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=t.betas, eps=t.eps, weight_decay=t.weight_decay)
    data = open_dataset(job.data, t.seq_len)
    order = SampleOrder(t.seed, data.samples, t.global_batch, t.microbatch)
    losses = []
    for step in range(1, until + 1):
        behind.zero_grad()
        total = 0.0
        for microbatch in range(t.total_microbatches):
            inputs, targets = map(torch.from_numpy, data.batch(order.indices(step, microbatch)))
            output = behind(inputs, dropout_key(t.seed, step, microbatch))
            loss = next_token_loss(output, targets)
            (loss / t.tokens_per_step).backward()
            total += loss.item()
        losses.append(total / t.tokens_per_step)
        for new, old in zip(newest.parameters(), behind.parameters(), strict=True):
            assert old.grad is not None
            new.grad = old.grad.clone()
            old.data.copy_(new.data)
        torch.nn.utils.clip_grad_norm_(newest.parameters(), t.grad_clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, t)
        optimizer.step()
    return losses
