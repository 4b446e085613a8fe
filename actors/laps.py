"""How long the parts of a recovery take, one after the other."""

from __future__ import annotations

import time

__all__ = ["Laps"]


class Laps:
    """Fills in how long one thing after the other took, in seconds."""

    def __init__(self, times: dict[str, float]) -> None:
        self._times = times
        self._since_s = time.monotonic()

    def lap(self, name: str) -> None:
        now_s = time.monotonic()
        self._times[name], self._since_s = now_s - self._since_s, now_s
