"""What a path between two machines carries, measured with TCP flows of our own.

sender   ██████████████████████████│ end      several flows at once, for a given time
receiver   ▁▂▄██████████████████████│          it notes when bytes come
                    └── warm half ──┘          the rate after slow start
         └─────┘ cold: the first message, on flows that were just opened
"""

from __future__ import annotations

import contextlib
import json
import secrets
import socket
import struct
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from ray_train_geo.errors import DeadlineError

__all__ = ["Arrivals", "BandwidthServer", "Carried", "carried"]

_BACKLOG = 64
_CHUNK_BYTES = 2**18
_NOTE_S = 2e-3
_FLOW, _ASK = b"F", b"A"
_NAME_BYTES = 16
_MOST_FLOWS = 256  # that nobody has asked for yet
COLD_BYTES = 2**20
"""Size of the first message, whose time on a cold flow is told apart."""


@dataclass(frozen=True, slots=True)
class Carried:
    """What flows carried.

    Args:
        warm_bytes_per_s: in the second half of the time, all flows together.
        cold_s: until the first ``cold_bytes`` had come, from when the first flow was opened.
        cold_bytes: fewer than :data:`COLD_BYTES` where not even so many came.
    """

    warm_bytes_per_s: float
    cold_s: float
    cold_bytes: int


@dataclass(frozen=True, slots=True)
class Arrivals:
    """When how many bytes of one flow had come, in seconds of the receiver's clock."""

    times_s: Sequence[float]
    totals: Sequence[int]

    def at(self, time_s: float) -> float:
        """Bytes that had come by ``time_s``; between two notes, evenly."""
        before_s, before = self.times_s[0], 0
        for after_s, after in zip(self.times_s, self.totals, strict=True):
            if after_s >= time_s:
                if after_s <= before_s:
                    return float(before)
                share = max(0.0, time_s - before_s) / (after_s - before_s)
                return before + share * (after - before)
            before_s, before = after_s, after
        return float(before)


class BandwidthServer:
    """Swallows what is sent to it and tells when it came, until it is closed.

    A connection begins with :data:`_FLOW` or :data:`_ASK` and the name of a flow.
    """

    def __init__(self, hostname: str) -> None:
        self._flows: OrderedDict[bytes, tuple[list[float], list[int]]] = OrderedDict()
        self._listener = socket.create_server((hostname, 0), backlog=_BACKLOG)
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._serve, name="bandwidth", daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                connection, _ = self._listener.accept()
                threading.Thread(target=self._hear, args=(connection,), daemon=True).start()

    def _hear(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection:
            kind, name = connection.recv(1), _exactly(connection, _NAME_BYTES)
            if kind == _FLOW:
                self._swallow(connection, name)
            elif kind == _ASK:
                connection.sendall(json.dumps(self._flows.pop(name, None)).encode())

    def _swallow(self, connection: socket.socket, name: bytes) -> None:
        buffer = bytearray(_CHUNK_BYTES)
        times, totals, total = [time.monotonic()], [0], 0
        self._flows[name] = times, totals
        while len(self._flows) > _MOST_FLOWS:
            self._flows.popitem(last=False)
        while got := connection.recv_into(buffer):
            total += got
            now = time.monotonic()
            if total <= COLD_BYTES or now - times[-1] >= _NOTE_S:
                times.append(now)
                totals.append(total)

    def close(self) -> None:
        # A blocked accept() ends by shutdown only.
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


def _exactly(connection: socket.socket, count: int) -> bytes:
    found = b""
    while len(found) < count and (part := connection.recv(count - len(found))):
        found += part
    return found


def carried(
    hostname: str, port: int, flows: int = 1, seconds: float = 0.5, deadline_s: float = 30.0
) -> Carried:
    """Send to the :class:`BandwidthServer` at ``port`` for ``seconds``, over ``flows`` connections.

    Raises:
        DeadlineError: the server can't be reached, or does not keep up.
    """
    found: list[Arrivals] = []
    failed: list[OSError | ValueError] = []
    start = threading.Barrier(flows)

    def flow() -> None:
        try:
            name = secrets.token_bytes(_NAME_BYTES)
            with socket.create_connection((hostname, port), timeout=deadline_s) as connection:
                start.wait(deadline_s)
                _send(connection, name, seconds)
            found.append(_ask(hostname, port, name, deadline_s))
        except (OSError, ValueError, threading.BrokenBarrierError) as e:
            start.abort()
            if not isinstance(e, threading.BrokenBarrierError):
                failed.append(e)

    threads = [threading.Thread(target=flow, daemon=True) for _ in range(flows)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if len(found) < flows:
        reason = failed[0] if failed else "a flow did not open"
        raise DeadlineError(f"no bandwidth to {hostname}:{port} could be measured: {reason}")
    return _summary(found, seconds)


def _send(connection: socket.socket, name: bytes, seconds: float) -> None:
    # What still waits to be sent in the end is dropped: on a slow link that would take long.
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    chunk = memoryview(bytes(_CHUNK_BYTES))
    connection.sendall(_FLOW + name)
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        connection.settimeout(left)
        with contextlib.suppress(TimeoutError):
            connection.send(chunk)


def _ask(hostname: str, port: int, name: bytes, deadline_s: float) -> Arrivals:
    with socket.create_connection((hostname, port), timeout=deadline_s) as connection:
        connection.sendall(_ASK + name)
        connection.shutdown(socket.SHUT_WR)
        answer = b""
        while part := connection.recv(_CHUNK_BYTES):
            answer += part
    found = json.loads(answer)
    if found is None:
        raise ValueError("the flow did not arrive")
    return Arrivals(*found)


def _summary(flows: Sequence[Arrivals], seconds: float) -> Carried:
    """Rates while all flows ran, by the receiver's one clock."""
    first_s = min(flow.times_s[0] for flow in flows)
    last_s = min(flow.times_s[-1] for flow in flows)
    end_s = min(last_s, first_s + seconds) if last_s > first_s + seconds / 2 else last_s
    half_s = (first_s + end_s) / 2
    rate = 0.0
    if end_s > half_s:
        rate = sum(flow.at(end_s) - flow.at(half_s) for flow in flows) / (end_s - half_s)
    cold_s, cold_bytes = last_s - first_s, 0
    for time_s in sorted(t for flow in flows for t in flow.times_s):
        cold_bytes = int(sum(flow.at(time_s) for flow in flows))
        cold_s = time_s - first_s
        if cold_bytes >= COLD_BYTES:
            break
    return Carried(rate, cold_s, cold_bytes)
