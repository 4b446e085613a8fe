"""Links that are persistently slower (or faster again) than they were, from what they carried.

A link's rate is bytes over the seconds in which any were on their way.  It is held against the
rate of the generation's first samples: how full messages and windows are is then in both.  Links
that are hardly busy are not judged: what they carry says little, and matters less.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass

from ray_train_geo.planning.drift import Drift

__all__ = ["LinkChange", "NodePair", "SlowLinkWatch", "Traffic"]

NodePair = tuple[str, str]
"""``(from node, to node)``"""

_FACTOR = 2.5
_PERSIST_S = 10.0
_LEAST_BYTES = 2**14
_LEAST_BUSY = 0.05


@dataclass(frozen=True, slots=True)
class Traffic:
    """What a directed link carried in some time.

    Args:
        busy_s: while bytes were on their way, added up over connections.
    """

    size_bytes: float = 0.0
    busy_s: float = 0.0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.size_bytes + other.size_bytes, self.busy_s + other.busy_s)

    def __sub__(self, other: Traffic) -> Traffic:
        return Traffic(self.size_bytes - other.size_bytes, self.busy_s - other.busy_s)


@dataclass(frozen=True, slots=True)
class LinkChange:
    """A link whose rate is not what it was.

    Args:
        ratio: of the old rate to the new one; below 1 it has become faster.
        bytes_per_s: its rate now.
    """

    pair: NodePair
    ratio: float
    bytes_per_s: float


class SlowLinkWatch:
    """Of one generation.

    Attributes:
        sound: links that were judged at the last call, and were as they used to be.
    """

    def __init__(self) -> None:
        self._drift: dict[NodePair, Drift] = {}
        self._last_s: float | None = None
        self.sound: set[NodePair] = set()

    def add(self, now_s: float, carried: Mapping[NodePair, Traffic]) -> list[LinkChange]:
        """What the traffic since the last call gives away."""
        since_s, self._last_s = self._last_s, now_s
        if since_s is None or now_s <= since_s:
            return []
        found, self.sound = [], set()
        for pair, traffic in sorted(carried.items()):
            if traffic.size_bytes < _LEAST_BYTES or traffic.busy_s <= 0:
                continue
            drift = self._drift.setdefault(pair, Drift(_FACTOR, _PERSIST_S))
            seconds_per_byte = traffic.busy_s / traffic.size_bytes
            usual = statistics.median(drift.usual) if drift.usual else None
            if traffic.busy_s < _LEAST_BUSY * (now_s - since_s) and usual is not None:
                # It is no news that an idle link is slow; one that has become faster may be idle.
                seconds_per_byte = min(seconds_per_byte, usual)
            elif usual is not None and 1 / _FACTOR < seconds_per_byte / usual < _FACTOR:
                self.sound.add(pair)
            drift.add(now_s, seconds_per_byte)
            ratio = drift.ratio
            if ratio is not None:
                drift.settle()
                found.append(LinkChange(pair, ratio, 1 / statistics.median(drift.usual)))
        return found
