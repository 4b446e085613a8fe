"""A stage's backward in two: gradients of activations at once, those of weights when there is time.

Most of a backward's time goes into linear maps ``y = x W^T + b``, half of it for the gradient that
the layer above waits for, half for the weight's own, which nobody waits for until the step ends
(Qi et al., "Zero Bubble Pipeline Parallelism", ICLR 2024)::

    B    dx = dy W                        what the stage above waits for
    W    dW = dy^T x,  db = sum(dy)       any time later

Each linear map leaves ``x`` and ``dy`` for its W; whatever else the forward kept is free after B.
Gradients of all other weights - norms, embeddings - come with B, as they cost next to nothing, and
are added up in W with the rest: so each weight gets its gradient once a microbatch, in W.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

__all__ = ["Deferred", "LeftForW", "Linear", "SplitBackward", "linear"]


class _Product(NamedTuple):
    """The gradients of one linear map's weight and bias, not computed yet."""

    weight: Tensor
    bias: Tensor | None
    x: Tensor
    gradient: Tensor

    def accumulate(self) -> None:
        x, dy = self.x.flatten(0, -2), self.gradient.flatten(0, -2)
        torch.autograd.backward(self.weight, dy.t() @ x)
        if self.bias is not None:
            torch.autograd.backward(self.bias, dy.sum(0))


class Deferred:
    """Where the linear maps of a stage leave their weights' gradients during a B."""

    def __init__(self) -> None:
        self._products: list[_Product] = []

    def add(self, weight: Tensor, bias: Tensor | None, x: Tensor, gradient: Tensor) -> None:
        self._products.append(_Product(weight, bias, x, gradient))

    def take(self) -> list[_Product]:
        """All since the last call, in the order of the backward."""
        found, self._products = self._products, []
        return found


class _Split(torch.autograd.Function):
    """A linear map whose backward gives the gradient of its input alone."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, deferred: Deferred
    ) -> Tensor:
        ctx.save_for_backward(x)  # which recomputation can replace, as it can no attribute
        ctx.weight, ctx.bias, ctx.deferred = weight, bias, deferred
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (x,) = ctx.saved_tensors
        ctx.deferred.add(ctx.weight, ctx.bias, x.detach(), gradient)
        return gradient @ ctx.weight, None, None, None


_split: Callable[..., Tensor] = _Split.apply


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, deferred: Deferred | None) -> Tensor:
    """``F.linear``, its weights' gradients left to ``deferred`` if there is one.

    Args:
        x: ``[..., in]``.
        weight: ``[out, in]``.
        bias: ``[out]``.
    """
    if deferred is None or not torch.is_grad_enabled():
        return F.linear(x, weight, bias)
    return _split(x, weight, bias, deferred)


class Linear(nn.Linear):
    """torch's, with a backward that can be split.

    Attributes:
        deferred: where its weights' gradients are left; None: they come with the others.
    """

    deferred: Deferred | None = None

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias, self.deferred)


class LeftForW(NamedTuple):
    """What the B of one microbatch leaves for its W.

    Args:
        direct: gradients that came with B.
    """

    direct: tuple[Tensor, ...]
    products: list[_Product]


class SplitBackward:
    """B and W of a stage.

    Args:
        deferred: where its linear maps leave their weights' gradients.
        direct: all its other weights.
    """

    def __init__(self, deferred: Deferred, direct: Sequence[nn.Parameter]) -> None:
        self._deferred = deferred
        self._direct = list(direct)

    def activations(
        self, stage_input: Tensor, output: Tensor, gradient: Tensor | None
    ) -> tuple[Tensor | None, LeftForW]:
        """B: the gradient of ``stage_input``, and what W needs.

        Args:
            stage_input: None is returned for tokens, which have no gradient.
            gradient: of ``output``; None for a loss.
        """
        wanted = [stage_input] if stage_input.requires_grad else []
        found = torch.autograd.grad(output, [*wanted, *self._direct], gradient)
        left = LeftForW(found[len(wanted) :], self._deferred.take())
        return found[0] if wanted else None, left

    def weights(self, left: LeftForW) -> None:
        """W: all gradients are added to their weights' ``.grad``, the deepest layer's first."""
        if self._direct:
            torch.autograd.backward(self._direct, left.direct)
        for product in left.products:
            product.accumulate()
