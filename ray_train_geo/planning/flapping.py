"""Nodes that come and go again soon wait longer and longer before they are taken back.

Each loss counts one; five minutes of a stay forgive one.  After ``n`` losses a node is kept out for
``2 ** (n - 1) - 1`` seconds: 0, 1, 3, 7 ... and five minutes at most.
"""

from __future__ import annotations

from collections.abc import Hashable

__all__ = ["Flapping"]

_FORGIVEN_S = 300.0
_LONGEST_S = 300.0


class Flapping:
    """Of all nodes of a run; times are in seconds of any clock that does not jump."""

    def __init__(self) -> None:
        self._since: dict[Hashable, float] = {}
        self._losses: dict[Hashable, float] = {}
        self._not_before: dict[Hashable, float] = {}

    def came(self, node: Hashable, now_s: float) -> None:
        """``node`` was taken in; if it is in already, nothing changes."""
        self._since.setdefault(node, now_s)

    def went(self, node: Hashable, now_s: float) -> float:
        """``node`` was lost, or could not be taken in; returns how long it is kept out."""
        stay_s = now_s - self._since.pop(node, now_s)
        losses = 1 + max(0.0, self._losses.get(node, 0.0) - stay_s / _FORGIVEN_S)
        self._losses[node] = losses
        # The exponent is kept small: a float has an end.
        wait_s: float = min(_LONGEST_S, 2.0 ** min(losses - 1, 60.0) - 1)
        self._not_before[node] = now_s + wait_s
        return wait_s

    def losses(self, node: Hashable) -> float:
        """How often ``node`` was lost, less what its stays have forgiven by its last loss."""
        return self._losses.get(node, 0.0)

    def kept_out(self, node: Hashable, now_s: float) -> bool:
        return now_s < self._not_before.get(node, now_s)
