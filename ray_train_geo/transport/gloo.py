"""Gloo transport: TCP between CPUs, and between GPUs that NCCL can't join.

Groups are made by us, from ``ProcessGroupGloo`` directly, not through ``init_process_group``: a
worker is in many overlapping groups, they are made anew for every generation, and none of them
is a property of the process.

CUDA tensors are staged through pinned host memory:

    send:  compute stream ──event──▶ copy stream: D2H ──event──▶ thread: gloo send
    recv:  gloo recv ──▶ thread: H2D on copy stream ──event──▶ compute stream

Gloo has no call that releases a blocked wait (``abort`` and ``shutdown`` do not).  What does is
the end of its TCP connection, so :meth:`GlooEndpoint.abort` shuts down the sockets that come from
or lead to the listeners of this generation: the wait here and the waits of all peers end within a
round trip, also when the peer is frozen or cut off.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import (
    FIRST_COMPLETED,
    Future,
    InvalidStateError,
    ThreadPoolExecutor,
    wait,
)
from concurrent.futures import TimeoutError as FutureTimeoutError
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import AllreduceOptions, PrefixStore, ProcessGroupGloo, Store

from ray_train_geo.errors import AbortedError, DeadlineError, TransportError
from ray_train_geo.transport import collectives
from ray_train_geo.transport.base import Pending

__all__ = ["GlooEndpoint", "GlooTransport"]

_POINT_TO_POINT_TAG = 0
_GROUP: Any = ProcessGroupGloo  # torch's stubs leave out what its groups can do


class GlooEndpoint:
    """This worker's side of all gloo groups of one generation.

    Args:
        store: rendezvous, already under a prefix that carries the generation.
        hostname: address that peers reach this worker at.
        deadline_s: longest wait for peers to join a group, and for a collective, in seconds.
    """

    def __init__(self, store: Store, hostname: str, deadline_s: float) -> None:
        self.deadline_s = deadline_s
        self._store = store
        before = set(_sockets())
        self._device = _GROUP.create_device(hostname=hostname)
        self._listeners = {
            address
            for fd in set(_sockets()) - before
            if (address := _listening_address(fd)) is not None
        }
        self._peer_listeners: set[tuple[str, int]] = set()
        self._aborting: Future[None] = Future()

    @property
    def aborted(self) -> bool:
        return self._aborting.done()

    @property
    def peers(self) -> set[str]:
        """Addresses of all peers that have joined groups with this worker, and its own."""
        return {host for host, _ in set(self._peer_listeners)}

    def connect(self, name: str, rank: int, size: int) -> GlooTransport:
        """Join the group ``name`` as ``rank`` of ``size``; returns when all have joined.

        Raises:
            DeadlineError: a member did not join in time.
            AbortedError: the endpoint was aborted.
            TransportError: a member can't be reached.
        """
        if self.aborted:
            raise AbortedError(f"group {name}: this generation was aborted")
        what = f"joining group {name} as rank {rank} of {size}"
        joined: Future[Any] = Future()

        def join() -> None:
            try:
                with _gloo_errors(self, what):
                    joined.set_result(self._join(name, rank, size))
            except BaseException as e:
                joined.set_exception(e)

        # Gloo and its store can't be told to stop waiting for a member that will never come.  A
        # thread that is left behind by an abort ends at the deadline.
        threading.Thread(target=join, name=f"join-{name}", daemon=True).start()
        wait((joined, self._aborting), return_when=FIRST_COMPLETED)
        if not joined.done():
            raise AbortedError(f"{what}: this generation was aborted")
        return GlooTransport(self, joined.result(), name, rank, size)

    def _join(self, name: str, rank: int, size: int) -> Any:
        options = _GROUP._Options()
        options._timeout = timedelta(seconds=self.deadline_s)
        options._devices = [self._device]
        options._threads = 2
        self._exchange_listeners(name, rank, size)
        return _GROUP(PrefixStore(f"gloo/{name}", self._store), rank, size, options)

    def _exchange_listeners(self, name: str, rank: int, size: int) -> None:
        """Learn where the peers listen: their sockets are found by it on abort."""
        store = PrefixStore(f"listeners/{name}", self._store)
        mine = ";".join(f"{host},{port}" for host, port in sorted(self._listeners))
        store.set(str(rank), mine)
        keys = [str(peer) for peer in range(size)]
        store.wait(keys, timedelta(seconds=self.deadline_s))
        for value in store.multi_get(keys):
            for item in value.decode().split(";"):
                host, _, port = item.rpartition(",")
                self._peer_listeners.add((host, int(port)))

    def abort(self) -> None:
        """Break every group of this endpoint, here and at its peers; callable from any thread."""
        with contextlib.suppress(InvalidStateError):  # it was aborted before
            self._aborting.set_result(None)
        ports = {port for _, port in self._listeners}
        for fd in _sockets():
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(fd)) as connection:
                # Gloo ends the process if a listener breaks; a listener has no peer's name, and
                # asking for it raises.
                peer = connection.getpeername()[:2]
                if connection.family == socket.AF_UNIX:
                    continue
                if peer in self._peer_listeners or connection.getsockname()[1] in ports:
                    connection.shutdown(socket.SHUT_RDWR)


class GlooTransport:
    """A group of ranks over gloo; see :class:`ray_train_geo.transport.base.Transport`."""

    def __init__(self, endpoint: GlooEndpoint, group: Any, name: str, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size
        self._endpoint = endpoint
        self._group: Any = group
        self._name = name
        self._collectives = 0
        self._unfinished: list[Pending] = []
        self._staging: ThreadPoolExecutor | None = None
        self._sent: dict[int, Future[None]] = {}

    def send(self, tensor: torch.Tensor, peer: int) -> Pending:
        if tensor.is_cuda:
            return self._track(self._staged_send(tensor, peer))
        return self._track(self._send(tensor, peer, _POINT_TO_POINT_TAG))

    def recv(self, tensor: torch.Tensor, peer: int) -> Pending:
        if tensor.is_cuda:
            host = torch.empty_like(tensor, device="cpu", pin_memory=True)
            return self._track(
                self._staged(tensor, host, self._recv(host, peer, _POINT_TO_POINT_TAG))
            )
        return self._track(self._recv(tensor, peer, _POINT_TO_POINT_TAG))

    def all_reduce(self, tensor: torch.Tensor) -> Pending:
        if self.size == 1:
            return _Done()
        if tensor.is_cuda:
            return self._track(self._staged_collective(tensor, self._all_reduce))
        return self._track(self._all_reduce(tensor))

    def reduce_scatter(self, tensor: torch.Tensor, shards: Sequence[int]) -> Pending:
        if self.size == 1:
            return _Done()
        if tensor.is_cuda:
            return self._track(
                self._staged_collective(tensor, lambda t: self._reduce_scatter(t, shards))
            )
        return self._track(self._reduce_scatter(tensor, shards))

    def all_gather(self, tensor: torch.Tensor, shards: Sequence[int]) -> Pending:
        if self.size == 1:
            return _Done()
        if tensor.is_cuda:
            return self._track(
                self._staged_collective(tensor, lambda t: self._all_gather(t, shards))
            )
        return self._track(self._all_gather(tensor, shards))

    def all_to_all(
        self,
        outgoing: torch.Tensor,
        sent: Sequence[int],
        incoming: torch.Tensor,
        received: Sequence[int],
    ) -> Pending:
        if outgoing.is_cuda:
            return self._track(self._staged_all_to_all(outgoing, sent, incoming, received))
        return self._track(
            collectives.all_to_all(self._tagged(), outgoing, sent, incoming, received)
        )

    def synchronize(self, timeout_s: float) -> None:
        unfinished, self._unfinished = self._unfinished, []
        for pending in unfinished:
            pending.wait(timeout_s)

    def abort(self) -> None:
        self._endpoint.abort()
        self.close()

    def close(self) -> None:
        self._unfinished.clear()
        if self._staging is not None:
            self._staging.shutdown(wait=False, cancel_futures=True)
            self._staging = None
        # The last reference ends the sockets; operations under way keep their own.
        self._group = None

    # ------------------------------------------------------------------ on host tensors

    def _open_group(self) -> Any:
        if self._endpoint.aborted or self._group is None:
            raise AbortedError(f"group {self._name} is closed")
        return self._group

    def _track(self, pending: Pending) -> Pending:
        # Only what is still under way needs to be remembered for synchronize().
        self._unfinished = [p for p in self._unfinished if not getattr(p, "done", False)]
        self._unfinished.append(pending)
        return pending

    def _what(self, verb: str, peer: int | None = None) -> str:
        whom = "" if peer is None else f" rank {peer}"
        return f"{verb}{whom} in group {self._name} (rank {self.rank} of {self.size})"

    def _send(self, tensor: torch.Tensor, peer: int, tag: int) -> _Work:
        what = self._what("sending to", peer)
        with _gloo_errors(self._endpoint, what):
            work = self._open_group().send([tensor], peer, tag)
        return _Work(self._endpoint, work, tensor, what)

    def _recv(self, tensor: torch.Tensor, peer: int, tag: int) -> _Work:
        what = self._what("receiving from", peer)
        with _gloo_errors(self._endpoint, what):
            work = self._open_group().recv([tensor], peer, tag)
        return _Work(self._endpoint, work, tensor, what)

    def _all_reduce(self, tensor: torch.Tensor) -> _Work:
        what = self._what("all-reduce")
        with _gloo_errors(self._endpoint, what):
            work = self._open_group().allreduce([tensor], AllreduceOptions())
        return _Work(self._endpoint, work, tensor, what)

    def _tagged(self) -> _Tagged:
        self._collectives += 1
        return _Tagged(self, _POINT_TO_POINT_TAG + self._collectives)

    def _reduce_scatter(self, tensor: torch.Tensor, shards: Sequence[int]) -> Pending:
        return collectives.reduce_scatter(self._tagged(), tensor, shards)

    def _all_gather(self, tensor: torch.Tensor, shards: Sequence[int]) -> Pending:
        return collectives.all_gather(self._tagged(), tensor, shards)

    # ------------------------------------------------------------------ staging of CUDA tensors

    def _pool(self) -> ThreadPoolExecutor:
        if self._staging is None:
            self._open_group()
            # A thread an operation: one that waits for its peer must not hold up the others.
            self._staging = ThreadPoolExecutor(16, thread_name_prefix=f"stage-{self._name}")
        return self._staging

    def _to_host(self, tensor: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event]:
        with torch.cuda.device(tensor.device):
            copy = torch.cuda.Stream()
            copy.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(copy):
                host = torch.empty_like(tensor, device="cpu", pin_memory=True)
                host.copy_(tensor, non_blocking=True)
                tensor.record_stream(copy)
                copied = torch.cuda.Event()
                copied.record(copy)
        return host, copied

    def _staged_send(self, tensor: torch.Tensor, peer: int) -> _Staged:
        host, copied = self._to_host(tensor)
        before, started = self._sent.get(peer), Future[None]()
        self._sent[peer] = started

        def send() -> None:
            try:
                copied.synchronize()
                if before is not None:
                    before.result()  # messages of a pair keep their order
                work = self._send(host, peer, _POINT_TO_POINT_TAG)
            finally:
                started.set_result(None)
            work.wait(self._endpoint.deadline_s)

        return _Staged(self._pool().submit(send), None, self._what("sending to", peer))

    def _staged(self, tensor: torch.Tensor, host: torch.Tensor, work: Pending) -> _Staged:
        """Once ``work`` has filled ``host``, copy it to ``tensor`` on a stream of its own."""
        ready = torch.cuda.Event()
        with torch.cuda.device(tensor.device):
            copy = torch.cuda.Stream()
            copy.wait_stream(torch.cuda.current_stream())
        tensor.record_stream(copy)

        def finish() -> None:
            work.wait(self._endpoint.deadline_s)
            with torch.cuda.device(tensor.device), torch.cuda.stream(copy):
                tensor.copy_(host, non_blocking=True)
                ready.record(copy)

        return _Staged(self._pool().submit(finish), ready, self._what("staging"))

    def _staged_collective(self, tensor: torch.Tensor, operation: Any) -> _Staged:
        # Collectives of a group must start in the same order everywhere, so the copy to the host
        # is awaited here; what it costs is hidden behind other buckets' transfers.
        host, copied = self._to_host(tensor)
        copied.synchronize()
        return self._staged(tensor, host, operation(host))

    def _staged_all_to_all(
        self,
        outgoing: torch.Tensor,
        sent: Sequence[int],
        incoming: torch.Tensor,
        received: Sequence[int],
    ) -> _Staged:
        leaving, copied = self._to_host(outgoing)
        coming = torch.empty_like(incoming, device="cpu", pin_memory=True)
        copied.synchronize()
        work = collectives.all_to_all(self._tagged(), leaving, sent, coming, received)
        return self._staged(incoming, coming, work)


class _Work:
    """A gloo operation; it keeps its tensor alive until it is done."""

    def __init__(self, endpoint: GlooEndpoint, work: Any, tensor: torch.Tensor, what: str) -> None:
        self._endpoint = endpoint
        self._work = work
        self._tensor: torch.Tensor | None = tensor
        self._what = what
        self.done = False

    def wait(self, timeout_s: float) -> None:
        if self.done:
            return
        with _gloo_errors(self._endpoint, f"{self._what}, deadline {timeout_s:.1f} s"):
            self._work.wait(timedelta(seconds=timeout_s))
        self.done = True
        self._tensor = None


class _Tagged:
    """The messages of one collective, which those of others can't be taken for."""

    def __init__(self, transport: GlooTransport, tag: int) -> None:
        self.rank, self.size = transport.rank, transport.size
        self._transport = transport
        self._tag = tag

    def send(self, tensor: torch.Tensor, peer: int) -> Pending:
        return self._transport._send(tensor, peer, self._tag)

    def recv(self, tensor: torch.Tensor, peer: int) -> Pending:
        return self._transport._recv(tensor, peer, self._tag)


class _Staged:
    """An operation that a staging thread carries out."""

    def __init__(self, future: Future[None], ready: torch.cuda.Event | None, what: str) -> None:
        self._future = future
        self._ready = ready
        self._what = what
        self.done = False

    def wait(self, timeout_s: float) -> None:
        if self.done:
            return
        try:
            self._future.result(timeout_s)
        except (FutureTimeoutError, TimeoutError):
            raise DeadlineError(f"{self._what}: nothing came within {timeout_s:.1f} s") from None
        if self._ready is not None:
            torch.cuda.current_stream().wait_event(self._ready)
        self.done = True


class _Done:
    """The operation of a group of one."""

    done = True

    def wait(self, timeout_s: float) -> None:
        """There is nothing to wait for."""


@contextlib.contextmanager
def _gloo_errors(endpoint: GlooEndpoint, what: str) -> Iterator[None]:
    """Turn what gloo and the store raise into errors of our own tree."""
    try:
        yield
    except TransportError:
        raise
    except RuntimeError as e:  # torch's DistError, DistStoreError and gloo's IoException are too
        text = str(e).splitlines()[0] if str(e) else type(e).__name__
        text = re.sub(r"^\[[^\]]*\] ", "", text)  # gloo's source file and line
        if endpoint.aborted:
            raise AbortedError(f"{what}: the generation was aborted") from e
        if re.search(r"timed? ?out|timeout", text, re.IGNORECASE):
            raise DeadlineError(f"{what}: {text}") from e
        raise TransportError(f"{what}: {text}") from e


def _sockets() -> list[int]:
    found = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                found.append(int(name))
    return found


def _listening_address(fd: int) -> tuple[str, int] | None:
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(fd)) as candidate:
        if candidate.family in (socket.AF_INET, socket.AF_INET6) and candidate.getsockopt(
            socket.SOL_SOCKET, socket.SO_ACCEPTCONN
        ):
            address = candidate.getsockname()
            return str(address[0]), int(address[1])
    return None
