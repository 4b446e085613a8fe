"""Heartbeats: closed at once, frozen after the deadline, and no alarm for one that answers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest

from ray_train_geo.transport.ping import PingServer
from ray_train_geo.transport.pulse import Pulse

SERVER = """
import time
from ray_train_geo.transport.ping import PingServer
print(PingServer("127.0.0.1").port, flush=True)
time.sleep(60)
"""


@pytest.fixture
def pulse() -> Iterator[Pulse]:
    pulse = Pulse()
    yield pulse
    pulse.close()


@pytest.fixture
def process() -> Iterator[tuple[subprocess.Popen[str], int]]:
    process = subprocess.Popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    yield process, int(process.stdout.readline())
    process.kill()
    process.communicate()


def within(seconds: float, condition: Callable[[], object]) -> bool:
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            return False
        time.sleep(0.01)
    return True


def test_a_process_that_ends_shows_at_once_and_a_frozen_one_after_its_deadline(
    pulse: Pulse, process: tuple[subprocess.Popen[str], int]
) -> None:
    worker, port = process
    pulse.watch("frozen", "127.0.0.1", port)
    other = PingServer("127.0.0.1")
    pulse.watch("well", "127.0.0.1", other.port)
    time.sleep(0.6)
    assert pulse.lost() == {}
    os.kill(worker.pid, signal.SIGSTOP)
    assert not within(2.0, pulse.lost)
    assert within(4.0, pulse.lost)
    assert "has not answered for" in pulse.lost()["frozen"]
    assert pulse.silence_s("frozen") > 2.0
    assert list(pulse.lost()) == ["frozen"]
    pulse.forget("frozen")
    assert pulse.lost() == {}
    os.kill(worker.pid, signal.SIGCONT)
    pulse.watch("killed", "127.0.0.1", port)
    worker.kill()
    worker.wait()
    assert within(1.0, pulse.lost)
    assert pulse.lost() == {"killed": "its process is gone"}
    other.close()


def test_one_that_can_not_be_reached_is_lost_at_once(pulse: Pulse) -> None:
    server = PingServer("127.0.0.1")
    server.close()
    pulse.watch("gone", "127.0.0.1", server.port)
    assert "can't be reached" in pulse.lost()["gone"]
