"""What a worker keeps of the model's state from one generation to the next.

    live      the state that it trains; the next generation takes it over without a copy
    copies    states of recent steps on the CPU: its own, to go back to, and its peers', to give
              back when they are lost

While a generation is being built the memory is *open*: peers may fetch what they need from it,
and nothing in it changes.  Training begins when all have what they need, and closes it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ray_train_geo.errors import AbortedError, TransportError
from ray_train_geo.training.precision import LossScale
from ray_train_geo.training.recycler import Recycler
from ray_train_geo.training.residuals import RESIDUAL, SPARE
from ray_train_geo.training.standing import Holding

__all__ = ["Memory", "Snapshot"]

_OPENING_S = 10.0


@dataclass(frozen=True, slots=True)
class Snapshot:
    """State of one step.

    Args:
        tensors: by flat name (:meth:`~ray_train_geo.training.state.StageState.tensors`).
    """

    step: int
    updates: int
    loss_scale: LossScale
    tensors: Mapping[str, torch.Tensor]

    def holding(self) -> Holding:
        names = frozenset(n.removeprefix("model.") for n in self.tensors if n.startswith("model."))
        residuals = frozenset(
            n.removeprefix(RESIDUAL) for n in self.tensors if n.startswith(RESIDUAL)
        )
        spares = frozenset(
            (weight, owner)
            for n in self.tensors
            if n.startswith(SPARE)
            for weight, _, owner in [n.removeprefix(SPARE).partition("@")]
        )
        return Holding(self.step, self.updates, self.loss_scale, names, residuals, spares)

    def facts(self) -> dict[str, Any]:
        """All but the tensors, as plain JSON."""
        scale = self.loss_scale
        return {
            "updates": self.updates,
            "loss_scale": scale.factor,
            "good_steps": scale.good_steps,
        }


class Memory:
    """One worker's; safe from several threads.  It is the shelf of its state server."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._live: Snapshot | None = None
        self._copies: dict[int, Snapshot] = {}
        self._recycler = Recycler()
        self._generation = 0
        self._open = False

    # ------------------------------------------------------------------ the worker's own side

    def enter(self, generation: int) -> None:
        """A generation is being built: peers may fetch."""
        with self._changed:
            self._generation, self._open = generation, True
            self._recycler.clear()
            self._changed.notify_all()

    def close(self) -> None:
        """All have what they need: what was live is its runtime's from now on."""
        with self._changed:
            self._open, self._live = False, None
            self._changed.notify_all()

    def hold(self, live: Snapshot) -> None:
        """``live`` is what this worker trains; what it held before is let go."""
        with self._changed:
            self._live = live

    def holdings(self) -> tuple[Holding, ...]:
        with self._changed:
            held = [*self._copies.values(), *([self._live] if self._live else [])]
        return tuple(snapshot.holding() for snapshot in held)

    def live_at(self, step: int) -> Mapping[str, torch.Tensor]:
        """The live tensors, if they are of ``step``: not copies."""
        with self._changed:
            live = self._live
        return live.tensors if live is not None and live.step == step else {}

    def copies_at(self, step: int) -> Mapping[str, torch.Tensor]:
        """Copies of state of ``step``; they stay as they are."""
        with self._changed:
            copy = self._copies.get(step)
        return {} if copy is None else copy.tensors

    def copied(self, live: Snapshot) -> Snapshot:
        """A copy on the CPU of what is live now.

        It is for :meth:`keep`, or a peer's: its memory is used again once it has been let go.
        """
        tensors = {name: self._recycler.copy(t) for name, t in live.tensors.items()}
        return Snapshot(live.step, live.updates, live.loss_scale, tensors)

    def keep(self, copy: Snapshot) -> None:
        """Add a copy to those of its step."""
        with self._changed:
            before = self._copies.get(copy.step)
            merged = {**(before.tensors if before else {}), **copy.tensors}
            self._copies[copy.step] = Snapshot(copy.step, copy.updates, copy.loss_scale, merged)

    def forget_before(self, step: float) -> None:
        """Drop copies of steps before ``step``: nobody will ever go back so far."""
        with self._changed:
            self._let_go([s for s in self._copies if s < step])

    def go_back(self, step: int) -> None:
        """Drop copies of steps after ``step``: they are computed anew, in another order of sums."""
        with self._changed:
            self._let_go([s for s in self._copies if s > step])

    def _let_go(self, steps: Sequence[int]) -> None:
        for step in steps:
            tensors = self._copies.pop(step).tensors.items()
            # Residuals are not copied again where they are taken over.
            owned = (t for name, t in tensors if not name.startswith((RESIDUAL, SPARE)))
            self._recycler.take_back(owned)

    # ------------------------------------------------------------------ for peers

    def give(self, generation: int, step: int, names: Sequence[str]) -> Mapping[str, torch.Tensor]:
        with self._changed:
            # A peer may be faster to enter a generation than this worker.
            until = time.monotonic() + _OPENING_S
            while self._generation < generation and time.monotonic() < until:
                self._changed.wait(_OPENING_S)
            if self._generation != generation or not self._open:
                raise AbortedError(f"generation {generation} is not being built here")
        found = {**self.copies_at(step), **self.live_at(step)}
        missing = [name for name in names if name not in found]
        if missing:
            raise TransportError(f"{missing[0]} of step {step} is not here")
        return {name: found[name] for name in names}

    def check(self, generation: int, step: int) -> None:
        if generation != self._generation:
            raise AbortedError(f"a copy of generation {generation}, now is {self._generation}")

    def room(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return self._recycler.empty(shape, dtype)

    def take(
        self, generation: int, step: int, facts: Mapping[str, Any], tensors: dict[str, torch.Tensor]
    ) -> None:
        with self._changed:
            self.check(generation, step)
            scale = LossScale(facts["loss_scale"], facts["good_steps"])
            self.keep(Snapshot(step, facts["updates"], scale, tensors))
