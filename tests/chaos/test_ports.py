from __future__ import annotations

import socket
from pathlib import Path

import pytest

from ray_train_geo.chaos import ports
from ray_train_geo.chaos.ports import free_ports
from ray_train_geo.errors import ClusterError


def test_they_can_be_bound_and_are_no_ones_by_chance():
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    for count in (1, 3):
        first = free_ports(count)
        assert first + count <= lowest
        held = [socket.socket() for _ in range(count)]
        for port, server in enumerate(held, first):
            server.bind(("127.0.0.1", port))
            server.close()


def test_taken_ones_are_left_out(monkeypatch):
    first = free_ports(4)
    monkeypatch.setattr(ports, "_LOWEST", first)
    monkeypatch.setattr(ports, "_HIGHEST", first + 3)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", first + 1))
        assert free_ports(2) == first + 2
        with pytest.raises(ClusterError, match=f"no 3 free ports .* {first} to {first + 3}"):
            free_ports(3)
