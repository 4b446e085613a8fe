"""Memory of copies that were let go, for the next ones.

A copy of all state is made every few steps.  Fresh memory for it costs five times as much as the
copying: the kernel clears every page, and takes it back when the copy goes.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Sequence

import torch

__all__ = ["Recycler"]


class Recycler:
    """Hands out CPU tensors, and takes back those that it has handed out; from any thread."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a tensor may die, and say so, while this is held
        self._lent: dict[int, weakref.ref[torch.Tensor]] = {}
        self._free: dict[tuple[tuple[int, ...], torch.dtype], list[torch.Tensor]] = {}

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A contiguous tensor; what is in it is of no account."""
        with self._lock:
            free = self._free.get((tuple(shape), dtype))
            tensor = free.pop() if free else torch.empty(tuple(shape), dtype=dtype)
            number = id(tensor)
            self._lent[number] = weakref.ref(tensor, lambda _: self._died(number))
            return tensor

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """``tensor`` as it is now, on the CPU."""
        return self.empty(tensor.shape, tensor.dtype).copy_(tensor.detach())

    def take_back(self, tensors: Iterable[torch.Tensor]) -> None:
        """Nobody will look at these again.  Those that were not handed out here are left alone."""
        with self._lock:
            for tensor in tensors:
                lent = self._lent.pop(id(tensor), None)
                if lent is not None and lent() is tensor:
                    key = tuple(tensor.shape), tensor.dtype
                    self._free.setdefault(key, []).append(tensor)

    def clear(self) -> None:
        """Copies will have other shapes."""
        with self._lock:
            self._free = {}

    def _died(self, number: int) -> None:
        with self._lock:
            self._lent.pop(number, None)
