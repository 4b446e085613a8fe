"""What a link really gives: round trips by ICMP, and the rate of a TCP connection.

``python -m ray_train_geo.lab.measure`` is the part that runs on a host.  It imports next to
nothing, so that many can start at once, and comes before ordinary processes where it may: this is
about links, not about who gets a processor.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import statistics
import struct
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

from ray_train_geo.errors import DeadlineError

if TYPE_CHECKING:
    from ray_train_geo.lab.lab import Lab

__all__ = ["rate_bytes_per_s", "round_trip_s"]

_ECHO_REQUEST, _ECHO_REPLY = 8, 0
_RECEIVED_AT = 35  # SO_TIMESTAMPNS, and the control message with it
_ANSWER_S = 3.0
_CHUNK_BYTES = 1 << 18
_PRIORITY = 10  # after the switch


def round_trip_s(lab: Lab, a: str | int, b: str | int, samples: int = 9) -> float:
    """The median of some round trips from host ``a`` to host ``b``, by the kernel's clock.

    The kernel on the other side answers, and notes when an answer came back: a processor that is
    busy on either side adds nothing.

    Raises:
        DeadlineError: no answer came.
    """
    done = _ask(lab, a, ["ping", lab.host(b).address, str(samples)])
    if not done["round_trips_s"]:
        raise DeadlineError(f"no answer to {samples} pings from {a} to {b}")
    return float(statistics.median(done["round_trips_s"]))


def rate_bytes_per_s(
    lab: Lab, a: str | int, b: str | int, seconds: float = 3.0, warmup_s: float | None = None
) -> float:
    """Bytes a second that one warm TCP connection carries from host ``a`` to host ``b``.

    Args:
        warmup_s: of the connection, before what counts; by default ten round trips (in that many
            TCP doubles its window a thousandfold), and no less than a second.

    Raises:
        DeadlineError: nothing arrived.
    """
    if warmup_s is None:
        warmup_s = max(1.0, 10 * round_trip_s(lab, a, b, samples=1))
    sink = _start(lab, b, ["sink", str(warmup_s), str(seconds)])
    assert sink.stdout is not None
    port = json.loads(sink.stdout.readline())["port"]
    source = _start(lab, a, ["source", lab.host(b).address, str(port)])
    try:
        done = _end(sink, warmup_s + seconds + 30)
    finally:
        source.kill()
        source.communicate()
    if not done["seconds"]:
        raise DeadlineError(f"nothing arrived at {b} from {a}")
    return float(done["size_bytes"] / done["seconds"])


def _start(lab: Lab, host: str | int, arguments: list[str]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "ray_train_geo.lab.measure", *arguments]
    return lab.popen(host, command, stdout=subprocess.PIPE)


def _ask(lab: Lab, host: str | int, arguments: list[str]) -> Any:
    return _end(_start(lab, host, arguments), 60)


def _end(process: subprocess.Popen[bytes], timeout_s: float) -> Any:
    try:
        text, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise DeadlineError(f"a measurement took longer than {timeout_s:g} s") from None
    return json.loads(text)


def _ping(address: str, samples: int) -> dict[str, Any]:
    """Round trips in seconds, one ping after the other."""
    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as icmp:
        icmp.setsockopt(socket.SOL_SOCKET, _RECEIVED_AT, 1)
        icmp.settimeout(_ANSWER_S)
        for number in range(samples):
            body = struct.pack("!HH", os.getpid() & 0xFFFF, number)
            header = struct.pack("!BBH", _ECHO_REQUEST, 0, 0) + body
            checksum = sum(struct.unpack("!4H", header))
            checksum = ~(checksum + (checksum >> 16)) & 0xFFFF
            message = struct.pack("!BBH", _ECHO_REQUEST, 0, checksum) + body
            sent_s = time.clock_gettime(time.CLOCK_REALTIME)
            icmp.sendto(message, (address, 0))
            try:
                while True:
                    answer, notes, _, sender = icmp.recvmsg(2048, 128)
                    if sender[0] == address and answer[20] == _ECHO_REPLY and answer[24:28] == body:
                        break
            except TimeoutError:
                continue
            seconds, nanoseconds = struct.unpack("qq", notes[0][2])
            found.append(seconds + nanoseconds * 1e-9 - sent_s)
    return {"round_trips_s": found}


def _sink(warmup_s: float, seconds: float) -> dict[str, Any]:
    """Bytes that one connection brings, after a warmup."""
    with socket.create_server(("", 0)) as listener:
        print(json.dumps({"port": listener.getsockname()[1]}), flush=True)
        connection, _ = listener.accept()
    with connection:
        buffer = bytearray(_CHUNK_BYTES)
        began_s = time.monotonic()
        start_s = last_s = began_s
        size = 0
        while last_s - began_s < warmup_s + seconds:
            got = connection.recv_into(buffer)
            if not got:
                break
            last_s = time.monotonic()
            if last_s - began_s < warmup_s:
                start_s = last_s
            else:
                size += got
    return {"size_bytes": size, "seconds": last_s - start_s}


def _source(address: str, port: int) -> dict[str, Any]:
    """Send until the other side has had enough."""
    with contextlib.suppress(ConnectionError), socket.create_connection((address, port)) as sending:
        chunk = bytes(_CHUNK_BYTES)
        while True:
            sending.sendall(chunk)
    return {}


def _main(what: str, *arguments: str) -> None:
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(_PRIORITY))
    match what:
        case "ping":
            found = _ping(arguments[0], int(arguments[1]))
        case "sink":
            found = _sink(float(arguments[0]), float(arguments[1]))
        case _:
            found = _source(arguments[0], int(arguments[1]))
    print(json.dumps(found))


if __name__ == "__main__":
    _main(*sys.argv[1:])
