"""A stand-in for CuPy's NCCL and for CUDA streams, between threads of one process.

It moves real bytes by their addresses, and blocks the host where NCCL blocks it.
"""

from __future__ import annotations

import ctypes
import functools
import sys
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from at_once import each
from torch.distributed import HashStore, Store

from ray_train_geo.transport import nccl as nccl_module
from ray_train_geo.transport import nccl_queue
from ray_train_geo.transport.nccl import NcclTransport, UniqueId

CPU = torch.device("cpu")
CODES = {
    torch.int8: 0,
    torch.uint8: 1,
    torch.int32: 2,
    torch.int64: 4,
    torch.float16: 6,
    torch.float32: 7,
    torch.float64: 8,
    torch.bfloat16: 9,
}


class Device(torch.Tensor):
    """Host memory that takes itself for a GPU's."""

    def record_stream(self, s: Any) -> None:
        assert isinstance(s, Stream)


def on_device(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.clone().as_subclass(Device)


class Stream:
    """Does everything at once; a busy one never finishes what it was given."""

    def __init__(self, device: int = -1, priority: int = 0) -> None:
        self.cuda_stream = id(self)
        self.busy = False
        self.waited_for: list[Event] = []

    def wait_event(self, event: Event) -> None:
        self.waited_for.append(event)


class Event:
    stream: Stream | None = None

    def record(self, stream: Stream) -> None:
        self.stream = stream

    def query(self) -> bool:
        return self.stream is None or not self.stream.busy


class NcclError(RuntimeError):
    pass


class Fabric:
    """What joins the communicators of a test: mail boxes, and a table of collectives."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.mail: dict[Any, deque[bytes]] = defaultdict(deque)
        self.collectives: dict[Any, dict[int, bytes]] = defaultdict(dict)
        self.joined: dict[Any, set[int]] = defaultdict(set)
        self.calls: list[str] = []
        self.ids = 0
        self.made: list[Communicator] = []
        self.form: type = bytes
        self.refusal: Exception | None = None
        self.current = Stream()
        self.group = threading.local()

    def get_unique_id(self) -> UniqueId:
        self.ids += 1
        unique_id = bytes([self.ids, *range(129, 256)])
        # CuPy 13 gives signed bytes.
        return unique_id if self.form is bytes else tuple(b - 256 * (b > 127) for b in unique_id)

    def group_start(self) -> None:
        self.group.calls = []
        self.calls.append("(")

    def group_end(self) -> None:
        calls, self.group.calls = self.group.calls, None
        self.calls.append(")")
        for offer, _ in calls:
            offer()
        for _, complete in calls:
            complete()

    def modules(self) -> dict[str, ModuleType]:
        cupy, cuda, nccl = (ModuleType(n) for n in ("cupy", "cupy.cuda", "cupy.cuda.nccl"))
        values = {f"NCCL_{str(t).removeprefix('torch.').upper()}": c for t, c in CODES.items()}
        vars(nccl).update(
            values,
            NCCL_SUM=0,
            available=True,
            get_unique_id=self.get_unique_id,
            groupStart=self.group_start,
            groupEnd=self.group_end,
            NcclCommunicator=lambda *args: Communicator(self, *args),
            NcclError=NcclError,
        )
        vars(cuda).update(nccl=nccl, runtime=SimpleNamespace(setDevice=lambda device: None))
        vars(cupy).update(cuda=cuda)
        return {m.__name__: m for m in (cupy, cuda, nccl)}

    def cuda(self) -> Any:
        return SimpleNamespace(
            Stream=Stream,
            Event=Event,
            init=lambda: None,
            current_device=lambda: -1,  # as get_device() of a tensor in host memory
            set_device=lambda device: None,
            current_stream=lambda device: self.current,
            is_available=lambda: True,
        )


class Communicator:
    """CuPy's ``NcclCommunicator``, with its signatures; the stream's work is done at once."""

    def __init__(self, fabric: Fabric, ndev: int, comm_id: UniqueId, rank: int) -> None:
        if not isinstance(comm_id, fabric.form):
            raise TypeError(f"expected {fabric.form}, got {type(comm_id)}")
        if fabric.refusal is not None:
            raise fabric.refusal
        assert len(comm_id) == 128
        self.fabric, self.size, self.id, self.rank = fabric, ndev, comm_id, rank
        self.ended: list[str] = []
        self.async_error: Exception | None = None
        self.count = 0
        with fabric.changed:
            fabric.joined[comm_id].add(rank)
            fabric.changed.notify_all()
            fabric.changed.wait_for(lambda: len(fabric.joined[comm_id]) == ndev)
        fabric.made.append(self)

    def _run(self, name: str, offer: Callable[[], None], complete: Callable[[], None]) -> None:
        assert not self.ended, "a call on a communicator that is gone"
        if self.rank == 0:
            self.fabric.calls.append(name)
        group = getattr(self.fabric.group, "calls", None)
        if group is not None:
            group.append((offer, complete))
        else:
            offer()
            complete()

    def _until(self, condition: Callable[[], bool]) -> None:
        self.fabric.changed.wait_for(lambda: condition() or bool(self.ended))
        if self.ended:
            raise NcclError("NCCL_ERROR_INTERNAL_ERROR: internal error")

    def send(self, sendbuf: int, count: int, datatype: int, peer: int, stream: int) -> None:
        def offer() -> None:
            with self.fabric.changed:
                data = ctypes.string_at(sendbuf, count * width(datatype))
                self.fabric.mail[self.id, self.rank, peer].append(data)
                self.fabric.changed.notify_all()

        self._run("send", offer, lambda: None)

    def recv(self, recvbuf: int, count: int, datatype: int, peer: int, stream: int) -> None:
        def complete() -> None:
            box = self.fabric.mail[self.id, peer, self.rank]
            with self.fabric.changed:
                self._until(lambda: bool(box))
                data = box.popleft()
            assert len(data) == count * width(datatype)
            ctypes.memmove(recvbuf, data, len(data))

        self._run("recv", lambda: None, complete)

    def _collective(self, name: str, source: int, count: int, done: Callable[[Any], None]) -> None:
        self.count += 1
        key = self.id, self.count, name
        slots = self.fabric.collectives[key]

        def offer() -> None:
            with self.fabric.changed:
                slots[self.rank] = ctypes.string_at(source, count)
                self.fabric.changed.notify_all()

        def complete() -> None:
            with self.fabric.changed:
                self._until(lambda: len(slots) == self.size)
            done([slots[rank] for rank in range(self.size)])

        self._run(name, offer, complete)

    def allReduce(
        self, sendbuf: int, recvbuf: int, count: int, datatype: int, op: int, stream: int
    ) -> None:
        size = count * width(datatype)
        self._collective(
            "allReduce", sendbuf, size, lambda parts: write(recvbuf, total(parts, datatype))
        )

    def reduce(
        self, sendbuf: int, recvbuf: int, count: int, datatype: int, op: int, root: int, stream: int
    ) -> None:
        def done(parts: list[bytes]) -> None:
            if self.rank == root:
                write(recvbuf, total(parts, datatype))

        self._collective("reduce", sendbuf, count * width(datatype), done)

    def broadcast(
        self, sendbuff: int, recvbuff: int, count: int, datatype: int, root: int, stream: int
    ) -> None:
        size = count * width(datatype)
        self._collective("broadcast", sendbuff, size, lambda parts: write(recvbuff, parts[root]))

    def reduceScatter(
        self, sendbuf: int, recvbuf: int, recvcount: int, datatype: int, op: int, stream: int
    ) -> None:
        size = recvcount * width(datatype)

        def done(parts: list[bytes]) -> None:
            whole = total(parts, datatype)
            write(recvbuf, whole[self.rank * size : (self.rank + 1) * size])

        self._collective("reduceScatter", sendbuf, size * self.size, done)

    def allGather(self, sendbuf: int, recvbuf: int, count: int, datatype: int, stream: int) -> None:
        size = count * width(datatype)
        self._collective("allGather", sendbuf, size, lambda parts: write(recvbuf, b"".join(parts)))

    def check_async_error(self) -> None:
        assert not self.ended, "asked a communicator that is gone"
        if self.async_error is not None:
            raise self.async_error

    def _end(self, how: str) -> None:
        with self.fabric.changed:
            self.ended.append(how)
            self.fabric.changed.notify_all()

    def abort(self) -> None:
        self._end("abort")

    def destroy(self) -> None:
        self._end("destroy")


def width(code: int) -> int:
    return next(d for d, c in CODES.items() if c == code).itemsize


def total(parts: Sequence[bytes], code: int) -> bytes:
    if not parts[0]:
        return b""
    dtype = next(d for d, c in CODES.items() if c == code)
    added = sum(torch.frombuffer(bytearray(p), dtype=dtype) for p in parts)
    assert isinstance(added, torch.Tensor)
    return bytes(added.to(dtype).view(torch.uint8).tolist())


def write(address: int, data: bytes) -> None:
    ctypes.memmove(address, data, len(data))


@contextmanager
def stand_in() -> Iterator[Fabric]:
    fabric = Fabric()
    with pytest.MonkeyPatch.context() as patch:
        for name, module in fabric.modules().items():
            patch.setitem(sys.modules, name, module)
        patch.setattr(nccl_module, "cuda", fabric.cuda())
        patch.setattr(nccl_queue, "cuda", fabric.cuda())
        yield fabric


def group(size: int, store: Store | None = None, deadline_s: float = 10.0) -> list[NcclTransport]:
    # Who waits for a key keeps its connection to itself: every rank has one of its own.
    shared: Any = store or HashStore()
    stores = [shared.clone() for _ in range(size)]

    def join(rank: int) -> NcclTransport:
        return NcclTransport.connect(stores[rank], "test", rank, size, CPU, deadline_s)

    return each([functools.partial(join, rank) for rank in range(size)])


def soon(condition: Callable[[], object]) -> bool:
    until = time.monotonic() + 5
    while not condition() and time.monotonic() < until:
        time.sleep(0.002)
    return bool(condition())
