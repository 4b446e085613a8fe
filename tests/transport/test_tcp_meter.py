from __future__ import annotations

import os
import socket
import sys
import threading
import time

import pytest

from ray_train_geo.transport.tcp_meter import TcpMeter

MB = 2**20


def carry(sender: socket.socket, receiver: socket.socket, size: int, bytes_per_s: float) -> None:
    """Send ``size`` bytes to somebody who reads so fast."""

    def read() -> None:
        left = size
        while left:
            left -= len(receiver.recv(min(left, 2**14)))
            time.sleep(2**14 / bytes_per_s)

    reader = threading.Thread(target=read)
    reader.start()
    sender.sendall(bytes(size))
    reader.join()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux counts for us")
def test_bytes_and_busy_time_are_those_since_the_last_look() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        one = socket.create_connection(server.getsockname())
        other, _ = server.accept()
        with one, other:
            meter = TcpMeter()
            meter.read({"127.0.0.1"})
            start_s = time.monotonic()
            carry(one, other, 4 * MB, 1e9)
            elapsed_s = time.monotonic() - start_s
            assert meter.read({"10.0.0.9"}) == {}, "nobody asked for what loopback carried"
            carry(one, other, 2 * MB, 1e9)
            carried = meter.read({"127.0.0.1"})["127.0.0.1"]
            assert carried.size_bytes == pytest.approx(2 * MB, rel=0.05)
            assert 0 <= carried.busy_s <= 10 * elapsed_s
            assert meter.read({"127.0.0.1"}) == {}, "idle"


def test_looking_leaves_nothing_open() -> None:
    looks = 40
    with socket.create_server(("127.0.0.1", 0)):
        before, meter = set(os.listdir("/proc/self/fd")), TcpMeter()
        for _ in range(looks):
            meter.read({"127.0.0.1"})
        opened = set(os.listdir("/proc/self/fd")) - before
    # What earlier tests left may open or close one meanwhile; a look that leaks leaves one each.
    assert len(opened) < looks / 2
