"""Error feedback: what codecs have left out of this worker's part of the sums, to be sent later.

A worker adds its residual to its gradient before it encodes, and keeps what the encoding lost
(Seide et al., 2014; Karimireddy et al., 2019).  So nothing is lost over time::

    sum of gradients + all residuals before  =  decoded sum + all residuals after

A residual belongs to a weight *and* to a holder of it.  It is state like AdamW's moments: it
changes with a commit only, and moves when layers do.  Who keeps a layer keeps its residual; who
gives one up hands its residual to a holder that stays, or comes; where a single holder is left,
which sends nothing, it goes into the next gradient.  Of a worker that dies, the copy that a peer
has is handed on (*spare*, made after each step where links have room for it: ``training.copies``);
without one its own residuals are lost.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch

from ray_train_geo.training.buckets import Bucket

__all__ = ["RESIDUAL", "SPARE", "Residuals", "saved_residual", "saved_residuals", "spare_name"]

RESIDUAL = "residual."
"""Before a weight's name, in a state's flat names."""


SPARE = "spare."
"""Likewise, of a copy of another worker's residual."""


def spare_name(weight: str, owner: str) -> str:
    """The flat name of a copy of ``owner``'s residual."""
    return f"{SPARE}{weight}@{owner}"


def saved_residual(name: str, rank: int) -> str:
    """The name in a checkpoint of ``rank``'s residual with the flat name ``name``."""
    return f"{name}@{rank}"


def saved_residuals(names: Iterable[str]) -> dict[str, list[str]]:
    """Flat name of a residual -> its names in a checkpoint that has ``names``, by rank."""
    found: dict[str, list[tuple[int, str]]] = {}
    for saved in names:
        name, _, rank = saved.rpartition("@")
        if name.startswith(RESIDUAL):
            found.setdefault(name, []).append((int(rank), saved))
    return {name: [saved for _, saved in sorted(ranks)] for name, ranks in found.items()}


class Residuals:
    """One worker's, in fp32 and without loss scale.

    Args:
        weights: by name.
    """

    def __init__(self, buckets: Sequence[Bucket], weights: Mapping[str, torch.Tensor]) -> None:
        self._weights = weights
        self._buckets = {i: b.names for i, b in enumerate(buckets) if len(b.holders) > 1}
        self._now = {i: self._zeros(names) for i, names in self._buckets.items()}
        self._next = {i: torch.zeros_like(flat) for i, flat in self._now.items()}
        self._changed: set[int] = set()
        self._inherited: dict[int, torch.Tensor] = {}
        self._leaving: dict[str, torch.Tensor] = {}
        self._unsent: dict[str, torch.Tensor] = {}
        self._unsent_inherited: dict[str, torch.Tensor] = {}
        self._released = False

    def _zeros(self, names: Sequence[str]) -> torch.Tensor:
        first = self._weights[names[0]]
        return torch.zeros(sum(self._weights[n].numel() for n in names), device=first.device)

    def _parts(self, flats: Mapping[int, torch.Tensor]) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        for index, flat in flats.items():
            names = self._buckets[index]
            sizes = [self._weights[n].numel() for n in names]
            for name, part in zip(names, flat.split(sizes), strict=True):
                found[name] = part.view_as(self._weights[name])
        return found

    def tensors(self) -> dict[str, torch.Tensor]:
        """``residual.NAME`` of all weights that this worker has one of its own for; not copies."""
        own = self._parts(self._now) | self._unsent | self._leaving
        return {f"{RESIDUAL}{name}": tensor for name, tensor in own.items()}

    def keep(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Go on with this worker's own of an earlier generation, by flat name.

        Those of weights that it gives up stay its own until the first step is committed: if it
        never is, the next generation finds them here.
        """
        _add(tensors, self._parts(self._now), self._unsent, self._weights)
        for flat_name, tensor in tensors.items():
            name = flat_name.removeprefix(RESIDUAL)
            if flat_name != name and name not in self._weights:
                self._leaving[name] = tensor

    def inherit(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take over what another worker gives up: it is fed into the first step."""
        if not self._inherited:
            self._inherited = {i: torch.zeros_like(flat) for i, flat in self._now.items()}
        _add(tensors, self._parts(self._inherited), self._unsent_inherited, self._weights)

    # ------------------------------------------------------------------ during a step

    def feed(self, bucket: int, gradients: torch.Tensor, scale: float) -> None:
        """Add the residual to the flat ``gradients`` of ``bucket``, which are times ``scale``."""
        gradients.add_(self._now[bucket], alpha=scale)
        if bucket in self._inherited:
            gradients.add_(self._inherited[bucket], alpha=scale)

    def leftover(self, bucket: int) -> torch.Tensor:
        """Where the bucket's next residual is to be written, flat, before :meth:`settle`."""
        return self._next[bucket]

    def settle(self, bucket: int, scale: float) -> None:
        """The bucket's next residual has been written, times ``scale``."""
        if scale != 1.0:
            self._next[bucket].mul_(1 / scale)
        self._changed.add(bucket)

    def release(self, scale: float) -> None:
        """Add to the gradients what has no peers any more that it could be sent to."""
        for unsent in (self._unsent, self._unsent_inherited):
            for name, tensor in unsent.items():
                gradient = self._weights[name].grad
                assert gradient is not None
                gradient.add_(tensor, alpha=scale)
        self._released = True

    def commit(self) -> None:
        """The step is applied: so its residuals are those to go on from."""
        for index in self._changed:
            self._now[index], self._next[index] = self._next[index], self._now[index]
            self._inherited.pop(index, None)
        self._changed.clear()
        self._leaving.clear()
        if self._released:
            self._unsent.clear()
            self._unsent_inherited.clear()

    def begin(self) -> None:
        """A new step: what a step that was not applied has left is forgotten."""
        self._changed.clear()
        self._released = False


def _add(
    tensors: Mapping[str, torch.Tensor],
    sent: Mapping[str, torch.Tensor],
    unsent: dict[str, torch.Tensor],
    weights: Mapping[str, torch.Tensor],
) -> None:
    """Add the residuals among ``tensors`` to those that are ``sent``, or else to ``unsent``."""
    for flat_name, tensor in tensors.items():
        name = flat_name.removeprefix(RESIDUAL)
        if flat_name == name or name not in weights:
            continue
        target = sent.get(name, unsent.get(name))
        if target is None:
            target = unsent[name] = torch.zeros_like(weights[name], dtype=torch.float32)
        target.add_(tensor.to(target.device))
