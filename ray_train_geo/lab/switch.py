"""The process behind a lab: parent of all hosts, and the switch that carries their packets.

::

    host 0  wan0 ─TUN─┐
    host 1  wan0 ─TUN─┼─ switch: Fabric ◀── control socket: cut, shape, kill, ...
    host 2  wan0 ─TUN─┘

It reads the network from its standard input and lives as long as that stays open, so it ends when
the lab's process ends, however that ends.  The hosts die with it, and then the kernel takes back
their namespaces, interfaces and processes.

It runs at real-time priority where that is allowed.  Without it a loaded machine makes round trips
of 40 ms take 56.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import gc
import json
import os
import select
import shutil
import signal
import socket
import struct
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from ray_train_geo.errors import GeoError, SpecError
from ray_train_geo.lab.fabric import Fabric
from ray_train_geo.lab.host import boot
from ray_train_geo.lab.network import Network

__all__ = ["CONTROL", "Switch", "congested", "size_on_wire"]

CONTROL = "control"
"""The control socket, in the lab's folder: each message is a request or its answer, in JSON."""

_OFFLOAD_HEADER_BYTES = 10
_LARGEST_PACKET_BYTES = 65536 + _OFFLOAD_HEADER_BYTES
_INTERFACE_GONE = (errno.EBADFD, errno.EIO)
_AT_ONCE = 16
_PRIORITY = 20
_MOST_MESSAGE_BYTES = 1 << 20


class Switch:
    """Hosts, the links between them, and who may change both.

    Args:
        network: what to emulate.
        folder: of the lab: the control socket and the hosts' names are in it.

    Raises:
        OSError: a host does not start.
    """

    def __init__(self, network: Network, folder: Path) -> None:
        self._network = network
        self._folder = folder
        self._names = folder / "hosts"
        self._names.write_text(
            "127.0.0.1 localhost\n" + "".join(f"{h.address} {h.name}\n" for h in network.hosts)
        )
        self._fabric = Fabric(network.links, self._deliver)
        for shared in network.shared:
            self._fabric.share(shared.name, shared.bytes_per_s, list(shared.pairs))
        self._number = {socket.inet_aton(h.address): i for i, h in enumerate(network.hosts)}
        self._pids: dict[int, int] = {}
        self._tuns: dict[int, int] = {}
        self._host_of: dict[int, int] = {}
        signal.signal(signal.SIGCHLD, self._bury)
        for i in range(len(network.hosts)):
            self._boot(i)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(str(folder / CONTROL))
        self._listener.listen(16)
        self._clients: dict[int, socket.socket] = {}

    def run(self, lifeline: int) -> None:
        """Carry packets until ``lifeline`` ends."""
        fabric, listener = self._fabric, self._listener.fileno()
        while True:
            fabric.advance(time.monotonic())
            files = [lifeline, listener, *self._host_of, *self._clients]
            wait_s = min(3600.0, max(0.0, fabric.next_s() - time.monotonic()))
            # select() waits to the microsecond, epoll to the millisecond.
            ready, _, _ = select.select(files, (), (), wait_s)
            for fd in ready:
                if fd in self._host_of:
                    self._take(fd)
                elif fd in self._clients:
                    self._answer(self._clients[fd])
                elif fd == listener:
                    client, _ = self._listener.accept()
                    self._clients[client.fileno()] = client
                elif not os.read(lifeline, 4096):
                    return

    def close(self) -> None:
        """Kill the hosts, and leave nothing."""
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for pid in self._pids.values():
            os.kill(pid, signal.SIGKILL)
        for pid in self._pids.values():
            os.waitpid(pid, 0)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _take(self, tun: int) -> None:
        """Packets that a host sends."""
        source = self._host_of[tun]
        for _ in range(_AT_ONCE):
            try:
                packet = os.read(tun, _LARGEST_PACKET_BYTES)
            except BlockingIOError:
                return
            except OSError as e:
                if e.errno in _INTERFACE_GONE:
                    self._forget(source)
                return
            if packet[10] >> 4 != 4:
                continue
            target = self._number.get(packet[26:30])
            if target is None or target == source:
                continue
            size_bytes, count, flow = size_on_wire(packet)
            self._fabric.send(time.monotonic(), (source, target), packet, size_bytes, count, flow)

    def _deliver(self, host: int, packet: bytes, crowded: bool) -> None:
        tun = self._tuns.get(host)
        if tun is not None:
            if crowded:
                packet = congested(packet)
            with contextlib.suppress(OSError):  # a dead host, or one whose memory is full
                os.write(tun, packet)

    def _boot(self, host: int) -> None:
        spec = self._network.hosts[host]
        pid, tun = boot(spec.name, spec.address, self._names)
        self._pids[host], self._tuns[host], self._host_of[tun] = pid, tun, host

    def _forget(self, host: int) -> None:
        tun = self._tuns.pop(host, None)
        if tun is not None:
            del self._host_of[tun]
            os.close(tun)

    def _bury(self, number: int, frame: FrameType | None) -> None:
        for host, pid in list(self._pids.items()):
            if os.waitpid(pid, os.WNOHANG)[0]:
                del self._pids[host]

    def _answer(self, client: socket.socket) -> None:
        try:
            message = client.recv(_MOST_MESSAGE_BYTES)
            if not message:
                raise ConnectionResetError
            try:
                answer = {"result": self._obey(json.loads(message))}
            except (GeoError, OSError) as e:
                answer = {"error": str(e)}
            client.send(json.dumps(answer).encode())
        except ConnectionError:
            del self._clients[client.fileno()]
            client.close()

    def _obey(self, request: Mapping[str, Any]) -> Any:
        match request:
            case {"do": "hosts"}:
                return {h.name: self._pids.get(i) for i, h in enumerate(self._network.hosts)}
            case {"do": "cut", "a": a, "b": b, "down": bool(down)}:
                for i, j in self._pairs(a, b):
                    self._fabric.cut((i, j), down)
                    self._fabric.cut((j, i), down)
            case {"do": "shape", "from": a, "to": b, "changes": changes}:
                for pair in self._pairs(a, b):
                    shape = dataclasses.replace(self._fabric.shape_of(pair), **changes)
                    self._fabric.shape(pair, shape)
            case {"do": "shapes"}:
                return self._by_name({p: self._fabric.shape_of(p) for p in self._network.links})
            case {"do": "traffic"}:
                return self._by_name(self._fabric.traffic())
            case {"do": "kill", "host": name}:
                for host in self._network.numbers(name):
                    # First from the network: a host without power tells nobody that it dies.
                    self._forget(host)
                    if host in self._pids:
                        os.kill(self._pids[host], signal.SIGKILL)
            case {"do": "boot", "host": name}:
                for host in self._network.numbers(name):
                    if host in self._pids:
                        raise SpecError(f"host {self._network.hosts[host].name} runs")
                    self._boot(host)
            case _:
                raise SpecError(f"the lab's switch does not know {request}")
        return None

    def _pairs(self, a: str, b: str | None) -> list[tuple[int, int]]:
        """From ``a`` to ``b``, hosts or regions; or to all that is not ``a``."""
        sources = self._network.numbers(a)
        targets = (
            set(range(len(self._network.hosts))) - set(sources)
            if b is None
            else self._network.numbers(b)
        )
        return [(i, j) for i in sources for j in sorted(targets) if i != j]

    def _by_name(self, found: Mapping[tuple[int, int], Any]) -> list[Any]:
        names = [h.name for h in self._network.hosts]
        return [[names[a], names[b], dataclasses.asdict(x)] for (a, b), x in found.items()]


def size_on_wire(packet: bytes) -> tuple[int, int, bytes]:
    """Bytes on the wire, packets on the wire, and what names the connection.

    A packet that the kernel left uncut has its headers in each of the pieces.
    """
    size = len(packet) - _OFFLOAD_HEADER_BYTES
    ip_header = (packet[10] & 15) * 4
    ports = 10 + ip_header
    flow = packet[22:30] + packet[ports : ports + 4]
    if not packet[1]:
        return size, 1, flow
    headers = ip_header + (packet[ports + 12] >> 4) * 4
    (piece,) = struct.unpack_from("<H", packet, 4)
    count = -(-(size - headers) // piece)
    return size + (count - 1) * headers, count, flow


def congested(packet: bytes) -> bytes:
    """The packet with "congestion experienced", if its sender understands that (RFC 3168)."""
    ecn = packet[11] & 3
    if ecn in (0, 3):
        return packet
    found = bytearray(packet)
    found[11] |= 3
    # The header's checksum is a ones' complement sum (RFC 1624, equation 3).
    total = ~int.from_bytes(packet[20:22], "big") & 0xFFFF
    total += 3 - ecn
    total = (total & 0xFFFF) + (total >> 16)
    found[20:22] = (~total & 0xFFFF).to_bytes(2, "big")
    return bytes(found)


def _real_time() -> bool:
    """Run before all ordinary processes, if allowed; the hosts don't."""
    try:
        os.sched_setscheduler(0, os.SCHED_RR | os.SCHED_RESET_ON_FORK, os.sched_param(_PRIORITY))
    except OSError:
        return False
    return True


def _main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):  # the lab's process decides when it ends
        signal.signal(number, signal.SIG_IGN)
    stdin = sys.stdin.fileno()
    size = int.from_bytes(os.read(stdin, 8), "big")
    text = b""
    while len(text) < size and (more := os.read(stdin, size - len(text))):
        text += more
    given = json.loads(text)
    real_time = _real_time()
    try:
        switch = Switch(Network.from_json(given["network"]), Path(given["folder"]))
    except OSError as e:
        print(json.dumps({"error": str(e)}), flush=True)
        return
    gc.freeze()
    gc.disable()  # nothing here makes cycles, and a collection delays packets
    print(json.dumps({"real_time": real_time}), flush=True)
    try:
        switch.run(stdin)
    finally:
        switch.close()


if __name__ == "__main__":
    _main()
