"""One rank of torch's own pipelining on a host of the geo lab: the peer of ``worldwide.py``.

    python benchmarks/torch_worker.py FOLDER RANK STORE_HOST STORE_PORT UNTIL gpipe|1f1b

The same stages, microbatches and emulated devices as ours; ``torch.distributed.pipelining`` moves
activations and gradients, and after the backwards one all-reduce of a stage's gradients over the
pipelines, as a plain data-parallel loop does it.  Rank 0 writes seconds a step.
"""

from __future__ import annotations

import json
import os
import pickle
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

from ray_train_geo.cluster.topology_file import load_topology
from ray_train_geo.model.stage import build_stage
from ray_train_geo.planning.cost import backward_s, forward_s
from ray_train_geo.training.assignment import Assignment
from ray_train_geo.training.on_time import on_time

_PATIENCE = timedelta(seconds=600)


class Paced(nn.Module):
    """A stage whose forwards and backwards last as long as its device needs."""

    def __init__(self, stage: nn.Module, forward_s: float, backward_s: float) -> None:
        super().__init__()
        self.stage = stage
        self.forward_s, self.backward_s = forward_s, backward_s

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        until = time.monotonic() + self.forward_s
        if x.is_floating_point():
            x = _Marked.apply(x, self, False)
        out: torch.Tensor = _Marked.apply(self.stage(x), self, True)
        time.sleep(max(0.0, until - time.monotonic()))
        return out


class _Marked(torch.autograd.Function):
    """The identity; its backward notes when a stage's backward begins, and sleeps at its end."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, paced: Paced, begins: bool) -> torch.Tensor:
        ctx.paced, ctx.begins = paced, begins
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        paced = ctx.paced
        if ctx.begins:
            paced.until = time.monotonic() + paced.backward_s
        else:
            time.sleep(max(0.0, paced.until - time.monotonic()))
        return grad, None, None


def main() -> None:
    folder, rank, host, port, until, schedule = Path(sys.argv[1]), *sys.argv[2:]
    torch.set_num_threads(1)
    on_time()
    assignments: list[Assignment] = pickle.loads((folder / "assignments.pickle").read_bytes())
    a = assignments[int(rank)]
    plan, training, role = a.plan, a.job.training, a.role
    pipeline = plan.pipelines[role.pipeline]
    os.environ |= {"MASTER_ADDR": host, "MASTER_PORT": port}
    dist.init_process_group("gloo", rank=a.rank, world_size=plan.world_size, timeout=_PATIENCE)
    chains = [
        dist.new_group([plan.rank(p, s) for s in range(len(each.stages))], timeout=_PATIENCE)
        for p, each in enumerate(plan.pipelines)
    ]
    replicas = [
        dist.new_group([plan.rank(p, s) for p in range(len(plan.pipelines))], timeout=_PATIENCE)
        for s in range(len(pipeline.stages))
    ]
    first, last = plan.stage(role).layers
    device = load_topology(folder / "topology.yaml").device(plan.stage(role).device)
    module = Paced(
        build_stage(a.dims, first, last, seed=training.seed, device=torch.device("cpu")),
        forward_s(a.dims, training, (first, last), device),
        backward_s(a.dims, training, (first, last), device),
    )
    module.until = 0.0
    hidden = torch.zeros(training.microbatch, training.seq_len, a.dims.dim)
    tokens = torch.zeros(training.microbatch, training.seq_len, dtype=torch.int64)
    stage = PipelineStage(
        module,
        role.stage,
        len(pipeline.stages),
        torch.device("cpu"),
        input_args=(tokens if role.stage == 0 else hidden,),
        group=chains[role.pipeline],
    )
    kind = ScheduleGPipe if schedule == "gpipe" else Schedule1F1B
    run = kind(stage, pipeline.microbatches, loss_fn=_loss)
    optimizer = torch.optim.AdamW(module.parameters(), lr=training.lr)
    generator = torch.Generator().manual_seed(role.pipeline)
    batch = (pipeline.microbatches * training.microbatch, training.seq_len)
    ends = role.stage in (0, len(pipeline.stages) - 1)
    seconds = []
    for _ in range(int(until)):
        began_s = time.perf_counter()
        data = torch.randint(a.dims.vocab_size, batch, generator=generator) if ends else None
        optimizer.zero_grad()
        if role.stage == 0:
            run.step(data)
        elif role.stage == len(pipeline.stages) - 1:
            run.step(target=data, losses=[])
        else:
            run.step()
        flat = torch.cat([p.grad.reshape(-1) for p in module.parameters()])
        dist.all_reduce(flat, group=replicas[role.stage])
        position = 0
        for p in module.parameters():
            p.grad.copy_(flat[position : position + p.numel()].view_as(p))
            position += p.numel()
        nn.utils.clip_grad_norm_(module.parameters(), training.grad_clip)
        optimizer.step()
        dist.barrier()
        seconds.append(time.perf_counter() - began_s)
    if a.rank == 0:
        (folder / "peer.json").write_text(json.dumps(seconds))
    dist.destroy_process_group()


def _loss(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten())


if __name__ == "__main__":
    main()
