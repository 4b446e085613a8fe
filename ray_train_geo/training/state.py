"""A stage's state: weights, summed gradients, optimizer and residuals, by global weight name.

    fp32    module weights = master weights;  their .grad = views of the flat buffers
    bf16    module weights (2 B) ◀─copy─ master weights (fp32);  backward's 2-byte gradients
    fp16    are added into the flat fp32 buffers and dropped, weight by weight

The flat buffers, one a bucket, are what gradient sync sends.  A bucket that no other rank holds
needs none in fp32: its gradients are left to autograd, which saves clearing and one addition.

With a delay of one step (:mod:`.delayed_stepping`) there are two sets of buffers, one that backward
fills while the other is summed, and the weights *before* the newest update are state, too:
``behind.NAME``, at which the next step is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from ray_train_geo.model.stage import StageModule
from ray_train_geo.spec import TrainingSpec
from ray_train_geo.training.buckets import Bucket
from ray_train_geo.training.optimizer import MOMENTS, AdamW
from ray_train_geo.training.outer import OuterState
from ray_train_geo.training.precision import DTYPES
from ray_train_geo.training.residuals import Residuals

__all__ = ["BEHIND", "StageState"]

BEHIND = "behind"
"""In flat names: a weight before the newest update."""


class StageState:
    """What a stage holds between steps, and how a step changes it.

    Args:
        module: the stage, in fp32, on its device; turned to the job's precision here.
        buckets: how the gradients are laid out in flat buffers.
        moments: AdamW's, to be taken over; see :class:`AdamW`.  Likewise, under local SGD,
            the outer optimizer's.
        local_sgd: there is an outer optimizer.
        feeds_back: sums are encoded, and what is left out is kept.
        delayed: sums come a step later.
    """

    def __init__(
        self,
        module: StageModule,
        training: TrainingSpec,
        buckets: Sequence[Bucket],
        moments: Mapping[str, torch.Tensor] | None = None,
        local_sgd: bool = False,
        feeds_back: bool = False,
        delayed: bool = False,
    ) -> None:
        self.module = module
        self.buckets = buckets
        parameters = dict(module.named_parameters())
        dtype = DTYPES[training.precision]
        self._low_precision = dtype != torch.float32
        self.weights: dict[str, torch.Tensor] = dict(parameters)
        if self._low_precision:
            # Turning the module gives its parameters new tensors; these stay what they were.
            self.weights = {n: p.detach() for n, p in parameters.items()}
            module.to(dtype)
        self._parameters = parameters
        self.buffers: dict[int, torch.Tensor] = {}
        for index, bucket in enumerate(buckets):
            if self._low_precision or delayed or len(bucket.holders) > 1:
                self.buffers[index] = self._empty_gradients(bucket)
        self.idle = {i: torch.zeros_like(flat) for i, flat in self.buffers.items() if delayed}
        self._point_gradients()
        self.behind: dict[str, torch.Tensor] | None = None
        if delayed:
            kept = moments or {}
            self.behind = {
                name: kept.get(f"{BEHIND}.{name}", weight.detach().clone())
                for name, weight in self.weights.items()
            }
        self.optimizer = AdamW(self.weights, training, moments)
        self.outer = OuterState(self.weights, moments or {}) if local_sgd else None
        self.residuals = Residuals(buckets, self.weights) if feeds_back else None

    def _empty_gradients(self, bucket: Bucket) -> torch.Tensor:
        elements = sum(self.weights[name].numel() for name in bucket.names)
        return torch.zeros(elements, device=self.weights[bucket.names[0]].device)

    def _point_gradients(self) -> None:
        """Weights' gradients are views of the flat buffers."""
        for index, buffer in self.buffers.items():
            names = self.buckets[index].names
            sizes = [self.weights[name].numel() for name in names]
            for name, part in zip(names, buffer.split(sizes), strict=True):
                self.weights[name].grad = part.view_as(self.weights[name])

    def swap_gradients(self) -> None:
        """With a delay: :attr:`buffers`, which backward fills and an update reads, become idle."""
        self.idle, filled = dict(self.buffers), self.idle
        self.buffers.update(filled)
        self._point_gradients()

    @torch.no_grad()
    def swap_behind(self) -> None:
        """With a delay: weights and those before the newest update take each other's places."""
        assert self.behind is not None
        for name, behind in self.behind.items():
            weight = self.weights[name].detach()
            newest = weight.clone()
            weight.copy_(behind)
            behind.copy_(newest)
        self.refresh()

    def gradients(self, bucket: int) -> list[torch.Tensor]:
        """The fp32 gradients of a bucket: its flat buffer, or each weight's."""
        if bucket in self.buffers:
            return [self.buffers[bucket]]
        grads = (self.weights[name].grad for name in self.buckets[bucket].names)
        return [g for g in grads if g is not None]

    def on_gradient(self, arrived: Callable[[str], None]) -> Callable[[], None]:
        """Call ``arrived(name)`` whenever backward has added a gradient to its flat buffer.

        Returns:
            What ends that.  A weight keeps its hooks alive, and what they refer to, out of the
            garbage collector's sight: without it, none of that is ever freed.
        """
        hooks = [
            self._parameters[name].register_post_accumulate_grad_hook(self._hook(name, arrived))
            for index in self.buffers
            for name in self.buckets[index].names
        ]

        def end() -> None:
            for hook in hooks:
                hook.remove()

        return end

    def _hook(self, name: str, arrived: Callable[[str], None]) -> Callable[[torch.Tensor], None]:
        if not self._low_precision:
            return lambda parameter: arrived(name)

        def hook(parameter: torch.Tensor) -> None:
            gradient = self.weights[name].grad
            assert gradient is not None
            assert parameter.grad is not None
            gradient.add_(parameter.grad)
            parameter.grad = None
            arrived(name)

        return hook

    def squared_norm(self, rank: int, buffers: Mapping[int, torch.Tensor] | None = None) -> float:
        """Sum of squares of the gradients that ``rank`` answers for: each counts once globally.

        Args:
            buffers: all of them, if not those of now.
        """
        mine = [
            gradient
            for index, bucket in enumerate(self.buckets)
            if bucket.holders[0] == rank
            for gradient in (self.gradients(index) if buffers is None else [buffers[index]])
        ]
        if not mine:
            return 0.0
        return float(torch.stack(torch._foreach_norm(mine)).double().square().sum())

    @torch.no_grad()
    def apply(self, learning_rate: float, factor: float) -> None:
        """One AdamW update with the gradients times ``factor``."""
        if self.behind is not None:
            for name, behind in self.behind.items():
                behind.copy_(self.weights[name])
        self.optimizer.step(learning_rate, factor)
        self.refresh()
        if self.residuals is not None:
            self.residuals.commit()

    def clear_gradients(self) -> None:
        for index, bucket in enumerate(self.buckets):
            if index in self.buffers:
                self.buffers[index].zero_()
            else:
                for name in bucket.names:
                    self.weights[name].grad = None
        if self.residuals is not None:
            self.residuals.begin()

    def refresh(self) -> None:
        """Bring the module's low-precision weights up to the master weights."""
        if self._low_precision:
            names = list(self._parameters)
            torch._foreach_copy_(
                [self._parameters[n].data for n in names], [self.weights[n] for n in names]
            )

    @property
    def updates(self) -> int:
        """AdamW updates so far; steps that overflowed do not count."""
        return self.optimizer.updates

    def tensors(self, names: Sequence[str] | None = None) -> dict[str, torch.Tensor]:
        """The state as flat names: ``model.NAME``, ``exp_avg.NAME``, ``exp_avg_sq.NAME``.

        Under local SGD also what ``training.outer`` names, with a delay ``behind.NAME``.  The
        tensors are the state itself, not copies.  Without ``names`` this worker's residuals are
        among them: as they are until the next step is applied.
        """
        chosen = list(self.weights if names is None else names)
        found = self.inner_tensors(chosen)
        if names is None and self.residuals is not None:
            found |= self.residuals.tensors()
        return found if self.outer is None else found | self.outer.tensors(chosen)

    def inner_tensors(self, names: Sequence[str]) -> dict[str, torch.Tensor]:
        """Of :meth:`tensors` those that every step changes in place."""
        found: dict[str, torch.Tensor] = {}
        for name in names:
            weight = self.weights[name]
            found[f"model.{name}"] = weight.detach()
            for moment in MOMENTS:
                found[f"{moment}.{name}"] = self.optimizer.moments[moment][name]
            if self.behind is not None:
                found[f"{BEHIND}.{name}"] = self.behind[name]
        return found

    @torch.no_grad()
    def load(self, tensors: Mapping[str, torch.Tensor], updates: int) -> None:
        """Take over what :meth:`tensors` named (a part is enough), and AdamW's update count."""
        mine = self.tensors()
        for name, tensor in tensors.items():
            mine[name].copy_(tensor)
        self.optimizer.updates = updates
        self.refresh()
