"""What a command is at, now and then, on stderr (level 3)."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field

__all__ = ["Ticker"]


@dataclass(slots=True)
class Ticker:
    """Prints a line at most every ``every_s`` seconds: what is quick stays silent."""

    every_s: float = 2.0
    _shown_s: float = field(default_factory=time.monotonic)

    def show(self, text: str) -> None:
        now_s = time.monotonic()
        if now_s - self._shown_s >= self.every_s:
            self._shown_s = now_s
            print(text, file=sys.stderr, flush=True)
