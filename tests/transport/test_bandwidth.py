"""Bandwidth between sockets of this machine, through a pipe that is as slow as it is told."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from ray_train_geo.errors import DeadlineError
from ray_train_geo.transport.bandwidth import COLD_BYTES, Arrivals, BandwidthServer, carried

RATE_BYTES_PER_S = 2e7


@contextlib.contextmanager
def server() -> Iterator[BandwidthServer]:
    found = BandwidthServer("127.0.0.1")
    try:
        yield found
    finally:
        found.close()


def throttled(port: int, bytes_per_s: float) -> int:
    """The port of a relay to ``port`` that passes on so much a second and connection."""
    listener = socket.create_server(("127.0.0.1", 0))

    def relay(source: socket.socket) -> None:
        with source, socket.create_connection(("127.0.0.1", port)) as target:
            began, passed = time.monotonic(), 0
            with contextlib.suppress(ConnectionError):  # the sender drops what is left
                while data := source.recv(16384):
                    passed += len(data)
                    time.sleep(max(0.0, began + passed / bytes_per_s - time.monotonic()))
                    target.sendall(data)
            target.shutdown(socket.SHUT_WR)
            while data := target.recv(65536):
                source.sendall(data)

    def serve() -> None:
        while True:
            threading.Thread(target=relay, args=(listener.accept()[0],), daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    return int(listener.getsockname()[1])


def test_a_throttled_flow_carries_what_it_is_throttled_to_and_two_carry_twice() -> None:
    with server() as sink:
        port = throttled(sink.port, RATE_BYTES_PER_S)
        one, two = (carried("127.0.0.1", port, flows, seconds=0.5) for flows in (1, 2))
    assert one.warm_bytes_per_s == pytest.approx(RATE_BYTES_PER_S, rel=0.15)
    assert two.warm_bytes_per_s == pytest.approx(2 * RATE_BYTES_PER_S, rel=0.15)
    assert one.cold_bytes >= COLD_BYTES
    assert one.cold_s == pytest.approx(COLD_BYTES / RATE_BYTES_PER_S, rel=0.5)


def test_loopback_is_faster_than_any_wan() -> None:
    with server() as sink:
        assert carried("127.0.0.1", sink.port, seconds=0.2).warm_bytes_per_s > 1e8


def test_a_link_too_slow_for_the_first_message_says_how_much_came() -> None:
    with server() as sink:
        port = throttled(sink.port, COLD_BYTES)
        found = carried("127.0.0.1", port, seconds=0.1)
    assert found.cold_bytes > 0
    assert found.cold_bytes / found.cold_s == pytest.approx(COLD_BYTES, rel=0.5)


def test_a_slow_link_takes_no_longer_than_it_is_given() -> None:
    with server() as sink:
        port, began = throttled(sink.port, 1e5), time.monotonic()
        found = carried("127.0.0.1", port, seconds=0.5)
    assert time.monotonic() - began < 3
    assert found.warm_bytes_per_s == pytest.approx(1e5, rel=0.5)


def test_no_server_is_an_error() -> None:
    with server() as sink:
        port = sink.port
    with pytest.raises(DeadlineError, match=f"to 127.0.0.1:{port}"):
        carried("127.0.0.1", port, flows=3, deadline_s=2.0)


def test_bytes_between_two_notes_came_evenly() -> None:
    arrivals = Arrivals([0.0, 1.0, 3.0], [0, 10, 30])
    assert [arrivals.at(t) for t in (-1.0, 0.5, 1.0, 2.0, 9.0)] == [0, 5, 10, 20, 30]
