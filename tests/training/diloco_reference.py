"""DiLoCo and Streaming DiLoCo in one process, written down as plainly as the papers do."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch

from ray_train_geo.data.dataset import open_dataset
from ray_train_geo.data.order import SampleOrder
from ray_train_geo.model.catalog import ModelDims
from ray_train_geo.model.dropout import dropout_key
from ray_train_geo.model.stage import StageModule, build_stage, next_token_loss
from ray_train_geo.spec import JobSpec
from ray_train_geo.training.optimizer import learning_rate


class Island:
    """A replica with an optimizer of its own, and the microbatches of a step that it takes."""

    def __init__(self, job: JobSpec, dims: ModelDims, microbatches: Sequence[int]) -> None:
        t = job.training
        self.model: StageModule = build_stage(dims, 0, dims.layers, seed=t.seed)
        self.weights = dict(self.model.named_parameters())
        self.microbatches = microbatches
        self.tokens = dict.fromkeys(self.weights, 0)
        self.inner = torch.optim.AdamW(
            [
                {"params": [p for p in self.weights.values() if p.dim() >= 2]},
                {"params": [p for p in self.weights.values() if p.dim() < 2], "weight_decay": 0.0},
            ],
            betas=t.betas,
            eps=t.eps,
            weight_decay=t.weight_decay,
        )

    def take(self, other: Island, weights: Collection[str]) -> None:
        """The other's parameters and moments of ``weights``."""
        for name in weights:
            self.weights[name].data.copy_(other.weights[name].data)
            self.tokens[name] = other.tokens[name]
            state = other.inner.state[other.weights[name]]
            self.inner.state[self.weights[name]] = {k: v.clone() for k, v in state.items()}


@dataclass(frozen=True)
class Goes:
    """How an island goes on after a change of plan.

    Args:
        island: whose number it was; where a weight is ``fresh``, that gives the moments only.
        microbatches: of each step from now on.
        fresh: weights that restart from the global parameters.
    """

    island: int
    microbatches: Sequence[int]
    fresh: Collection[str] = ()
    moments_of: int | None = None


def fragment(name: str, dims: ModelDims, fragments: int) -> int:
    parts = name.split(".")
    if parts[0] == "layers":
        return int(parts[1]) % fragments
    return 0 if parts[0] in ("tokens", "positions") else (dims.layers - 1) % fragments


def run_diloco(
    job: JobSpec,
    dims: ModelDims,
    microbatches: Sequence[Sequence[int]],
    until: int,
    closes: Collection[int] = (),
    changes: Mapping[int, Sequence[Goes]] | None = None,
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses of all steps, and the parameters after the last one, which merges everything.

    Args:
        microbatches: of each island.
        closes: further steps after which everything is merged.
        changes: after these steps islands go on as said; what is on the wire is lost.
    """
    t, spec = job.training, job.local_sgd
    assert spec is not None
    among = [Island(job, dims, mine) for mine in microbatches]
    world = build_stage(dims, 0, dims.layers, seed=t.seed)
    outer = {
        name: (w, torch.optim.SGD([w], spec.outer_lr, spec.outer_momentum, nesterov=True))
        for name, w in world.named_parameters()
    }
    data = open_dataset(job.data, t.seq_len)
    order = SampleOrder(t.seed, data.samples, t.global_batch, t.microbatch)
    flying: list[tuple[int, str, torch.Tensor, list[torch.Tensor]]] = []
    losses = []

    def average(name: str) -> torch.Tensor:
        total = sum(island.tokens[name] for island in among)
        mean = torch.zeros_like(outer[name][0])
        for island in among:
            share = island.tokens[name] / total
            mean += share * (outer[name][0].detach() - island.weights[name].detach())
            island.tokens[name] = 0
        return mean

    def merge(name: str, mean: torch.Tensor, mix: float, sent: Sequence[torch.Tensor]) -> None:
        weight, sgd = outer[name]
        weight.grad = mean
        sgd.step()
        for island, before in zip(among, sent, strict=True):
            own = island.weights[name]
            since = own.data - before if spec.carry else 0.0
            own.data = mix * own.data + (1 - mix) * (weight.data + since)

    def copies(name: str) -> list[torch.Tensor]:
        return [island.weights[name].detach().clone() for island in among]

    for step in range(1, until + 1):
        loss_sum = 0.0
        for island in among:
            island.inner.zero_grad()
            for group in island.inner.param_groups:
                group["lr"] = learning_rate(step, t)
            for microbatch in island.microbatches:
                inputs, targets = map(torch.from_numpy, data.batch(order.indices(step, microbatch)))
                key = dropout_key(t.seed, step, microbatch)
                loss = next_token_loss(island.model(inputs, key), targets)
                (loss / (len(island.microbatches) * t.microbatch * t.seq_len)).backward()
                loss_sum += loss.item()
            torch.nn.utils.clip_grad_norm_(island.model.parameters(), t.grad_clip)
            island.inner.step()
            for name in island.tokens:
                island.tokens[name] += len(island.microbatches)
        losses.append(loss_sum / t.tokens_per_step)
        closing = step == until or step in closes
        for flight in [f for f in flying if f[0] == step or closing]:
            _, name, mean, sent = flight
            merge(name, mean, spec.mix, sent)
        flying = [f for f in flying if not (f[0] == step or closing)]
        for name in outer:
            turn = spec.inner_steps * (fragment(name, dims, spec.fragments) + 1) // spec.fragments
            if closing:
                merge(name, average(name), 0.0, copies(name))
            elif step % spec.inner_steps == turn % spec.inner_steps:
                if spec.delay_steps:
                    lands, sent = step + spec.delay_steps, copies(name)
                    flying.append((lands, name, average(name), sent))
                else:
                    merge(name, average(name), 0.0, copies(name))
        if changes and step in changes:
            before, among = among, []
            flying.clear()
            for goes in changes[step]:
                island = Island(job, dims, goes.microbatches)
                island.take(before[goes.island], set(outer) - set(goes.fresh))
                if goes.fresh:
                    assert goes.moments_of is not None
                    island.take(before[goes.moments_of], goes.fresh)
                for name in goes.fresh:
                    island.weights[name].data.copy_(outer[name][0].data)
                    island.tokens[name] = 0
                among.append(island)
    return losses, {name: w.detach() for name, (w, _) in outer.items()}
