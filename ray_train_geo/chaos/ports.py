"""Ports for servers of a cluster on this machine that are bound only some time later."""

from __future__ import annotations

import contextlib
import random
import socket
from pathlib import Path

from ray_train_geo.errors import ClusterError

__all__ = ["free_ports"]

_EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")
_LOWEST, _HIGHEST = 20_000, 32_767
"""Above the ports that Ray gives to workers; below Linux's usual ones for connections."""


def free_ports(count: int = 1) -> int:
    """The first of ``count`` free ports in a row, on all interfaces.

    The kernel gives none of them to a connection, or to a server that takes any port.  So what is
    free now is free when Ray, after seconds, gets to it, unless somebody asks for that very port;
    they are drawn at random, so that two who call this don't.

    Raises:
        ClusterError: there are none.
    """
    highest = _HIGHEST
    with contextlib.suppress(OSError, ValueError):
        highest = min(highest, int(_EPHEMERAL.read_text().split()[0]) - 1)
    firsts = range(_LOWEST, highest + 2 - count)
    for first in random.SystemRandom().sample(firsts, len(firsts)):
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in range(first, first + count):
                stack.enter_context(socket.socket()).bind(("", port))
            return first
    raise ClusterError(f"no {count} free ports in a row from {_LOWEST} to {highest}")
