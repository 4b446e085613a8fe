"""The state before the newest step, to go back to while that step may yet be lost."""

from __future__ import annotations

import torch

from ray_train_geo.training.memory import Snapshot
from ray_train_geo.training.precision import LossScale
from ray_train_geo.training.state import StageState

__all__ = ["Previous"]


class Previous:
    """Room for one copy of a stage's state, on its device; filled anew before each step.

    What the outer optimizer keeps is not copied: it is replaced, not changed.
    """

    def __init__(self, state: StageState) -> None:
        self._state = state
        self._inner = state.inner_tensors(list(state.weights))
        self._room = {name: torch.empty_like(t) for name, t in self._inner.items()}
        self._snapshot: Snapshot | None = None

    @torch.no_grad()
    def keep(self, step: int, scale: LossScale) -> None:
        """The state is that of ``step``, and is about to change."""
        torch._foreach_copy_(list(self._room.values()), list(self._inner.values()))
        tensors = self._state.tensors() | self._room
        self._snapshot = Snapshot(step, self._state.updates, scale, tensors)

    def snapshot(self) -> Snapshot | None:
        """What was kept last; it is overwritten by the next :meth:`keep`."""
        return self._snapshot
