"""What local SGD keeps besides a stage's own state: the parameters that all islands last agreed on.

    outer.NAME           global parameters, as of the weight's last merge
    outer_momentum.NAME  of the outer optimizer
    outer_tokens.NAME    tokens that this island has learned from since it last sent

They lie in host memory, and are replaced rather than changed: who keeps a reference keeps the state
of that step.

A merge (Douillard et al., DiLoCo, 2023, algorithm 1; Streaming DiLoCo, 2025, algorithm 2), with the
pseudogradient ``g`` of a weight averaged over islands, ``m`` the momentum, ``o`` the global and
``w`` the island's own parameters::

    m ← μ m + g        o ← o - lr (g + μ m)        w ← mix w + (1 - mix) (o + c)

``c`` is 0, or (``carry``) what the island has learned since it sent its own ``g``.  With that, and
``mix`` 0, each step of an island is in exactly one pseudogradient (as in delayed averaging: Zhu et
al., DaSGD, 2020).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

__all__ = ["OUTER", "OUTER_MOMENTUM", "OUTER_TOKENS", "OuterState"]

OUTER, OUTER_MOMENTUM, OUTER_TOKENS = "outer", "outer_momentum", "outer_tokens"


class OuterState:
    """Of the weights of one stage.

    Args:
        weights: by name, fp32; the island's own parameters, changed by merges.
        kept: outer state to be taken over, by flat name; what is missing begins at ``weights``.
    """

    def __init__(
        self, weights: Mapping[str, torch.Tensor], kept: Mapping[str, torch.Tensor]
    ) -> None:
        self._weights = weights
        self._index = {name: i for i, name in enumerate(weights)}
        self._global: dict[str, torch.Tensor] = {}
        self._momentum: dict[str, torch.Tensor] = {}
        self._tokens = torch.zeros(len(weights), dtype=torch.float64)
        for name, weight in weights.items():
            own = kept.get(f"{OUTER}.{name}")
            self._global[name] = weight.detach().to("cpu", copy=True) if own is None else own
            momentum = kept.get(f"{OUTER_MOMENTUM}.{name}")
            zeros = torch.zeros(weight.shape)
            self._momentum[name] = zeros if momentum is None else momentum
            tokens = kept.get(f"{OUTER_TOKENS}.{name}")
            self._tokens[self._index[name]] = 0 if tokens is None else tokens

    def tensors(self, names: Sequence[str]) -> dict[str, torch.Tensor]:
        """The state by flat name."""
        found: dict[str, torch.Tensor] = {}
        for name in names:
            found[f"{OUTER}.{name}"] = self._global[name]
            found[f"{OUTER_MOMENTUM}.{name}"] = self._momentum[name]
            found[f"{OUTER_TOKENS}.{name}"] = self._tokens[self._index[name]]
        return found

    def learned(self, tokens: int) -> None:
        """A step on ``tokens`` was applied to all weights."""
        self._tokens = self._tokens + tokens

    def tokens(self, names: Sequence[str]) -> torch.Tensor:
        """fp64 ``[names]``: what the pseudogradients of now rest on."""
        return self._tokens[[self._index[name] for name in names]]

    def pseudogradient(self, names: Sequence[str]) -> torch.Tensor:
        """fp32, flat: what was learned since the last merge, with the sign of a gradient."""
        parts = [self._global[n] - self._weights[n].detach().cpu() for n in names]
        return torch.cat([part.view(-1) for part in parts])

    @torch.no_grad()
    def merge(
        self,
        names: Sequence[str],
        mean: torch.Tensor,
        sent_tokens: torch.Tensor,
        lr: float,
        momentum: float,
        mix: float,
        sent: torch.Tensor | None = None,
    ) -> None:
        """One step of the outer optimizer on ``names``, and its result into the weights.

        Args:
            mean: the averaged pseudogradient, as :meth:`pseudogradient`.
            sent_tokens: :meth:`tokens` when it was sent.
            mix: what stays of the weights.
            sent: this island's own pseudogradient, to carry on what it has learned since then.
        """
        sizes = [self._global[name].numel() for name in names]
        own = [None] * len(names) if sent is None else sent.split(sizes)
        for name, part, mine in zip(names, mean.split(sizes), own, strict=True):
            before, weight = self._global[name], self._weights[name]
            gradient = part.view_as(before)
            speed = momentum * self._momentum[name] + gradient
            merged = before - lr * (gradient + momentum * speed)
            self._momentum[name], self._global[name] = speed, merged
            if mine is not None:
                merged = merged + (weight.detach().cpu() - (before - mine.view_as(before)))
            weight.copy_(merged.to(weight.device).lerp(weight, mix) if mix else merged)
        left = self._tokens.clone()
        left[[self._index[name] for name in names]] -= sent_tokens
        self._tokens = left

    @torch.no_grad()
    def restart(self, names: Sequence[str]) -> None:
        """Begin at the global parameters: nothing is learned yet."""
        for name in names:
            self._weights[name].copy_(self._global[name])
            self._tokens[self._index[name]] = 0

    @torch.no_grad()
    def rebase(self) -> None:
        """The weights are what all islands agree on."""
        for name, weight in self._weights.items():
            self._global[name] = weight.detach().to("cpu", copy=True)
        self._tokens = torch.zeros_like(self._tokens)
