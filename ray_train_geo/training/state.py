"""A stage's state: weights, summed gradients and optimizer, by global weight name.

    fp32    module weights = master weights;  their .grad = views of the flat buffers
    bf16    module weights (2 B) ◀─copy─ master weights (fp32);  backward's 2-byte gradients
    fp16    are added into the flat fp32 buffers and dropped, weight by weight

The flat buffers, one a bucket, are what gradient sync sends.  A bucket that no other rank holds
needs none in fp32: its gradients are left to autograd, which saves clearing and one addition.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ray_train_geo.model.stage import StageModule
from ray_train_geo.spec import TrainingSpec
from ray_train_geo.training.buckets import Bucket
from ray_train_geo.training.optimizer import (
    MOMENTS,
    build_optimizer,
    optimizer_steps,
    set_optimizer_steps,
)
from ray_train_geo.training.precision import DTYPES

__all__ = ["StageState"]


class StageState:
    """What a stage holds between steps, and how a step changes it.

    Args:
        module: the stage, in fp32, on its device; turned to the job's precision here.
        buckets: how the gradients are laid out in flat buffers.
    """

    def __init__(
        self, module: StageModule, training: TrainingSpec, buckets: Sequence[Bucket]
    ) -> None:
        self.module = module
        self.buckets = buckets
        parameters = dict(module.named_parameters())
        dtype = DTYPES[training.precision]
        self._low_precision = dtype != torch.float32
        self.weights: dict[str, torch.Tensor] = dict(parameters)
        if self._low_precision:
            self.weights = {n: p.detach().clone() for n, p in parameters.items()}
            module.to(dtype)
        self._parameters = parameters
        self.buffers: dict[int, torch.Tensor] = {}
        for index, bucket in enumerate(buckets):
            if self._low_precision or len(bucket.holders) > 1:
                self.buffers[index] = self._flat_gradients(bucket)
        self.optimizer = build_optimizer(self.weights, training)

    def _flat_gradients(self, bucket: Bucket) -> torch.Tensor:
        sizes = [self.weights[name].numel() for name in bucket.names]
        buffer = torch.zeros(sum(sizes), device=self.weights[bucket.names[0]].device)
        for name, part in zip(bucket.names, buffer.split(sizes), strict=True):
            self.weights[name].grad = part.view_as(self.weights[name])
        return buffer

    def gradients(self, bucket: int) -> list[torch.Tensor]:
        """The fp32 gradients of a bucket: its flat buffer, or each weight's."""
        if bucket in self.buffers:
            return [self.buffers[bucket]]
        grads = (self.weights[name].grad for name in self.buckets[bucket].names)
        return [g for g in grads if g is not None]

    def on_gradient(self, arrived: Callable[[str], None]) -> None:
        """Call ``arrived(name)`` whenever backward has added a gradient to its flat buffer."""
        for index in self.buffers:
            for name in self.buckets[index].names:
                parameter = self._parameters[name]
                parameter.register_post_accumulate_grad_hook(self._hook(name, arrived))

    def _hook(self, name: str, arrived: Callable[[str], None]) -> Callable[[torch.Tensor], None]:
        if not self._low_precision:
            return lambda parameter: arrived(name)
        gradient = self.weights[name].grad
        assert gradient is not None

        def hook(parameter: torch.Tensor) -> None:
            assert parameter.grad is not None
            gradient.add_(parameter.grad)
            parameter.grad = None
            arrived(name)

        return hook

    def squared_norm(self, rank: int) -> float:
        """Sum of squares of the gradients that ``rank`` answers for: each counts once globally."""
        mine = [
            gradient
            for index, bucket in enumerate(self.buckets)
            if bucket.holders[0] == rank
            for gradient in self.gradients(index)
        ]
        if not mine:
            return 0.0
        return float(torch.stack(torch._foreach_norm(mine)).double().square().sum())

    @torch.no_grad()
    def apply(self, learning_rate: float, factor: float) -> None:
        """One AdamW update with the gradients times ``factor``."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer: Any = self.optimizer  # torch's stubs lack what its GradScaler sets
        optimizer.grad_scale = None
        if factor != 1.0:
            # The fused kernel divides by this as it reads the gradients: no pass of their own.
            device = self.optimizer.param_groups[0]["params"][0].device
            optimizer.grad_scale = torch.tensor(1.0 / factor, device=device)
        optimizer.step()
        self._refresh()

    def clear_gradients(self) -> None:
        for index, bucket in enumerate(self.buckets):
            if index in self.buffers:
                self.buffers[index].zero_()
            else:
                for name in bucket.names:
                    self.weights[name].grad = None

    def _refresh(self) -> None:
        """Bring the module's low-precision weights up to the master weights."""
        if self._low_precision:
            names = list(self._parameters)
            torch._foreach_copy_(
                [self._parameters[n].data for n in names], [self.weights[n] for n in names]
            )

    @property
    def updates(self) -> int:
        """AdamW updates so far; steps that overflowed do not count."""
        return optimizer_steps(self.optimizer)

    def tensors(self, names: Sequence[str] | None = None) -> dict[str, torch.Tensor]:
        """The state as flat names: ``model.NAME``, ``exp_avg.NAME``, ``exp_avg_sq.NAME``.

        The tensors are the state itself, not copies.
        """
        found: dict[str, torch.Tensor] = {}
        for name in self.weights if names is None else names:
            weight = self.weights[name]
            found[f"model.{name}"] = weight.detach()
            for moment in MOMENTS:
                found[f"{moment}.{name}"] = self.optimizer.state[weight][moment]
        return found

    @torch.no_grad()
    def load(self, tensors: Mapping[str, torch.Tensor], updates: int) -> None:
        """Take over what :meth:`tensors` named (a part is enough), and AdamW's update count."""
        mine = self.tensors()
        for name, tensor in tensors.items():
            mine[name].copy_(tensor)
        set_optimizer_steps(self.optimizer, updates)
        self._refresh()
