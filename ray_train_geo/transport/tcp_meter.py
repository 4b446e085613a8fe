"""What this process's TCP connections carry, as the kernel counts it: nothing is sent for it.

Linux keeps for each connection the bytes that were acknowledged, and the time in which any were on
their way (``tcpi_busy_time``), with the part of it in which the receiver's window was closed: there
the receiver was slow to read, not the link.  Bytes over seconds is the rate that one flow gets,
whatever library wrote them: gloo's pairs, NCCL's sockets, streams of state.
"""

from __future__ import annotations

import os
import socket
import struct
import sys
from collections.abc import Collection, Iterator

from ray_train_geo.planning.slow_links import Traffic

__all__ = ["TcpMeter"]

# Of struct tcp_info in linux/tcp.h.
_BYTES_ACKED = 120
_BUSY_TIME = 168  # in us, followed by that with a closed receive window
_INFO_SIZE = 192
_LEAST_BYTES = 2**14
"""Connections that carried less since the last look tell of latency, not of bandwidth."""


class TcpMeter:
    """Counts from one call to the next."""

    def __init__(self) -> None:
        self._before: dict[tuple[object, object], Traffic] = {}

    def read(self, peers: Collection[str]) -> dict[str, Traffic]:
        """What was carried to the addresses ``peers`` since the last call, by address.

        Empty where the kernel does not say.
        """
        now: dict[tuple[object, object], Traffic] = {}
        carried: dict[str, Traffic] = {}
        for ends, host, total in _connections():
            now[ends] = total
            since = total - self._before.get(ends, Traffic())
            if host in peers and since.size_bytes >= _LEAST_BYTES:
                carried[host] = carried.get(host, Traffic()) + since
        self._before = now
        return carried


def _connections() -> Iterator[tuple[tuple[object, object], str, Traffic]]:
    """Both ends, the peer's address and the traffic so far of each TCP connection."""
    if sys.platform != "linux":
        return
    for name in os.listdir("/proc/self/fd"):
        path = f"/proc/self/fd/{name}"
        try:
            if not os.readlink(path).startswith("socket:"):
                continue
            copy = os.dup(int(name))
        except OSError:  # closed meanwhile
            continue
        try:
            connection = socket.socket(fileno=copy)
        except OSError:  # another thread's file took its number
            os.close(copy)
            continue
        try:
            with connection:
                if connection.type != socket.SOCK_STREAM or connection.family == socket.AF_UNIX:
                    continue
                here, there = connection.getsockname(), connection.getpeername()
                info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
        except OSError:  # a listener, or broken
            continue
        if len(info) < _INFO_SIZE:
            continue
        (acked,) = struct.unpack_from("=Q", info, _BYTES_ACKED)
        busy_us, closed_us = struct.unpack_from("=2Q", info, _BUSY_TIME)
        traffic = Traffic(float(acked), max(0, busy_us - closed_us) / 1e6)
        yield (here, there), str(there[0]).removeprefix("::ffff:"), traffic
