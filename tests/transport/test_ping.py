"""Pings between sockets of this machine."""

from __future__ import annotations

import pytest

from ray_train_geo.errors import DeadlineError
from ray_train_geo.transport.ping import PingServer, round_trip_s


def test_a_round_trip_on_one_machine_is_short() -> None:
    server = PingServer("127.0.0.1")
    try:
        assert 0 < round_trip_s("127.0.0.1", server.port) < 0.05
        assert 0 < round_trip_s("127.0.0.1", server.port, samples=1) < 0.5
    finally:
        server.close()


def test_a_closed_server_is_an_error() -> None:
    server = PingServer("127.0.0.1")
    server.close()
    with pytest.raises(DeadlineError, match="no answer"):
        round_trip_s("127.0.0.1", server.port, deadline_s=1.0)
