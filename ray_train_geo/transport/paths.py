"""When the bytes of a message leave over an emulated link, and over what links share (pure).

A message leaves through token buckets, byte behind byte, and arrives a latency after its last one::

    send ──▶ │ link │ NIC out │ NIC in │ uplink │ ──▶ latency ──▶ there
             └ one message at a time; buckets are shared,
               5 ms at a time, with other links' messages

A bucket saves nothing up: there are no bursts.  When bytes leave is computed from when the message
was there and when the bytes before it left, so a thread that wakes late delays one message and not
all that follow it.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence

from ray_train_geo.planning.slow_links import Traffic

__all__ = ["Path", "TokenBucket"]

_TURN_S = 5e-3
"""What a message takes of shared buckets before others have their turn."""


class TokenBucket:
    """Bytes pass one behind the other; used under the lock of its :class:`Path` only."""

    __slots__ = ("free_s", "seconds_per_byte")

    def __init__(self, seconds_per_byte: float) -> None:
        self.seconds_per_byte = seconds_per_byte
        self.free_s = -math.inf


class Path:
    """A directed link between two devices, and what it shares with others.

    Args:
        latency_s: from the moment at which the last byte has left, in seconds.
        buckets: what all bytes pass; the link's own comes first.
        lock: the same for all paths that share a bucket.

    Attributes:
        traffic: bytes that have left, and for how long there were any to leave.
    """

    def __init__(
        self, latency_s: float, buckets: Sequence[TokenBucket], lock: threading.Lock
    ) -> None:
        self._lock = lock
        self.traffic = Traffic()
        self.change(latency_s, buckets)

    def change(self, latency_s: float, buckets: Sequence[TokenBucket]) -> None:
        """Be another link from now on, also for what is on its way; called under the lock."""
        self.latency_s = latency_s
        self._buckets = buckets
        slowest = max(bucket.seconds_per_byte for bucket in buckets)
        self._turn_bytes = max(1.0, _TURN_S / slowest) if slowest else math.inf

    def leave(self, size_bytes: int, ready_s: float) -> Iterator[float]:
        """Send a message that is there from ``ready_s`` on, turn by turn.

        Yields:
            When the last byte of a turn has left, by the monotonic clock.  Who goes on before that
            takes the turn of others.
        """
        left_s = ready_s
        while size_bytes:
            with self._lock:
                turn_bytes = int(min(size_bytes, self._turn_bytes))
                own_s = max(left_s, self._buckets[0].free_s)
                start_s = max(left_s, *(bucket.free_s for bucket in self._buckets))
                for bucket in self._buckets:
                    bucket.free_s = start_s + turn_bytes * bucket.seconds_per_byte
                left_s = max(bucket.free_s for bucket in self._buckets)
                self.traffic += Traffic(turn_bytes, left_s - own_s)
            size_bytes -= turn_bytes
            yield left_s
