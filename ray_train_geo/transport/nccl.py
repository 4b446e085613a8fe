"""NCCL transport: CUDA tensors from GPU to GPU, through CuPy's ``NcclCommunicator``.

A transport is one communicator and one CUDA stream, so it carries *one direction* of an edge:

    stage 0   s0  s1  s2  s3  ─▶        the k-th send meets the k-th receive, whatever else
    stage 1   r0  r1  r2  r3  ─▶        the two GPUs do in between: nothing can block in a circle

With both directions in one queue, a receive posted ahead would block the send behind it:

    stage 0   r0  s0                    both wait for the other's send,
    stage 1   r0  s0                    which stands behind the wait

CuPy is imported here only, and only when a transport is made.

Two settings of GPU workers matter.  ``CUDA_DEVICE_MAX_CONNECTIONS=32``: with more streams than
hardware queues (8 by default) a queued receive can hold up computation.  And a kernel that CUDA
loads lazily, at its first launch, may wait for all running kernels, a receive among them: compute
once before the first receive is posted, or set ``CUDA_MODULE_LOADING=EAGER`` (CUDA programming
guide, "Lazy Loading", concurrent execution).
"""

from __future__ import annotations

import json
import re
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import accumulate
from typing import Any

import torch
from torch import cuda
from torch.distributed import PrefixStore, Store

from ray_train_geo.errors import ClusterError, DeadlineError, TransportError
from ray_train_geo.transport.base import Pending
from ray_train_geo.transport.nccl_queue import NcclQueue, first_line

__all__ = ["NcclTransport", "UniqueId", "nccl_available"]

UniqueId = bytes | tuple[int, ...]
"""NCCL's name of a communicator to be: 128 bytes from CuPy 14 on, a tuple of integers before."""

_DTYPES = {
    torch.float32: "NCCL_FLOAT32",
    torch.float16: "NCCL_FLOAT16",
    torch.bfloat16: "NCCL_BFLOAT16",
    torch.float64: "NCCL_FLOAT64",
    torch.int8: "NCCL_INT8",
    torch.uint8: "NCCL_UINT8",
    torch.int32: "NCCL_INT32",
    torch.int64: "NCCL_INT64",
}


def nccl_available() -> bool:
    """Whether a CUDA device, CuPy, and an NCCL library that CuPy can load are here."""
    try:
        _import_nccl()
    except ClusterError:
        return False
    return cuda.is_available()


class NcclTransport:
    """A group of ranks over NCCL; see :class:`ray_train_geo.transport.base.Transport`.

    Every error ends the transport: it aborts itself, so that whoever else waits on it is released.
    Wrong arguments raise ValueError, and change nothing.

    Args:
        unique_id: made by one rank (:meth:`connect` does it) and the same on all.
        device: CUDA device of this rank; no other rank of the group may use it.
        deadline_s: longest wait for all ranks to join, and for :meth:`close`, in seconds.
        name: of the group, for messages.

    Raises:
        ClusterError: CuPy or NCCL is not installed.
        DeadlineError: a rank did not join in time.
        TransportError: NCCL refused, for example because two ranks name the same device.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        unique_id: UniqueId,
        device: torch.device,
        *,
        deadline_s: float,
        name: str = "nccl",
    ) -> None:
        if not 0 <= rank < size:
            raise ValueError(f"rank {rank} is not in a group of {size}")
        self.rank = rank
        self.size = size
        self._name = name
        self._deadline_s = deadline_s
        self._nccl = _import_nccl()
        cuda.init()
        self._device = cuda.current_device() if device.index is None else device.index
        self._queue = NcclQueue(
            lambda: _communicator(self._nccl, size, unique_id, rank, self._device),
            self._device,
            f"group {name} (rank {rank} of {size})",
            deadline_s,
        )

    @classmethod
    def connect(
        cls,
        store: Store,
        prefix: str,
        rank: int,
        size: int,
        device: torch.device,
        deadline_s: float,
    ) -> NcclTransport:
        """Join the group ``prefix`` as ``rank`` of ``size``; returns when all have joined.

        Connections between the GPUs are opened by the first operations, not here.

        Args:
            store: rendezvous, already under a prefix that carries the generation: a group can
                be joined only once under one prefix.

        Raises:
            ClusterError, DeadlineError, TransportError: as the constructor.
        """
        nccl = _import_nccl()
        until = time.monotonic() + deadline_s
        what = f"joining group {prefix} as rank {rank} of {size}"
        store = PrefixStore(f"nccl/{prefix}", store)
        unique_id = _share_unique_id(nccl, store, rank, deadline_s, what)
        left_s = max(until - time.monotonic(), 0.0)
        transport = cls(rank, size, unique_id, device, deadline_s=left_s, name=prefix)
        transport._deadline_s = deadline_s
        return transport

    @property
    def stream(self) -> cuda.Stream:
        """What all operations run on.

        It is one of torch's 32 high-priority streams: more live transports on one device would
        share them, and could block each other.
        """
        return self._queue.stream

    # ------------------------------------------------------------------ between two ranks

    def send(self, tensor: torch.Tensor, peer: int) -> Pending:
        pointer, count, dtype = self._message(tensor, peer)
        stream = self.stream.cuda_stream
        return self._queue.start(
            f"sending to rank {peer}",
            (tensor,),
            lambda comm: comm.send(pointer, count, dtype, peer, stream),
        )

    def recv(self, tensor: torch.Tensor, peer: int) -> Pending:
        pointer, count, dtype = self._message(tensor, peer)
        stream = self.stream.cuda_stream
        return self._queue.start(
            f"receiving from rank {peer}",
            (tensor,),
            lambda comm: comm.recv(pointer, count, dtype, peer, stream),
        )

    def exchange(self, sent: torch.Tensor, received: torch.Tensor, peer: int) -> Pending:
        """Start sending ``sent`` to ``peer`` and receiving ``received`` from it, at once.

        The two run beside each other, so both ranks may do this together.  ``peer`` may be this
        rank itself: then it is a copy, which checks an installation with one GPU only.
        """
        self._check_peer(peer)
        source, source_count, source_dtype = self._buffer(sent)
        target, target_count, target_dtype = self._buffer(received)
        stream = self.stream.cuda_stream

        def call(comm: Any) -> None:
            with self._group():
                comm.send(source, source_count, source_dtype, peer, stream)
                comm.recv(target, target_count, target_dtype, peer, stream)

        return self._queue.start(f"exchanging with rank {peer}", (sent, received), call)

    # ------------------------------------------------------------------ between all ranks

    def all_reduce(self, tensor: torch.Tensor) -> Pending:
        pointer, count, dtype = self._buffer(tensor)
        add, stream = self._nccl.NCCL_SUM, self.stream.cuda_stream
        return self._queue.start(
            "all-reduce",
            (tensor,),
            lambda comm: comm.allReduce(pointer, pointer, count, dtype, add, stream),
        )

    def reduce_scatter(self, tensor: torch.Tensor, shards: Sequence[int]) -> Pending:
        pointer, _, dtype = self._buffer(tensor)
        counts, starts = _shards(tensor, shards, self.size)
        add, stream = self._nccl.NCCL_SUM, self.stream.cuda_stream

        def call(comm: Any) -> None:
            if len(set(counts)) == 1:  # all that NCCL's own can do; these addresses mean in place
                comm.reduceScatter(pointer, starts[self.rank], counts[0], dtype, add, stream)
                return
            with self._group():
                for root, (start, count) in enumerate(zip(starts, counts, strict=True)):
                    if count:
                        comm.reduce(start, start, count, dtype, add, root, stream)

        return self._queue.start("reduce-scatter", (tensor,), call)

    def all_gather(self, tensor: torch.Tensor, shards: Sequence[int]) -> Pending:
        pointer, _, dtype = self._buffer(tensor)
        counts, starts = _shards(tensor, shards, self.size)
        stream = self.stream.cuda_stream

        def call(comm: Any) -> None:
            if len(set(counts)) == 1:
                comm.allGather(starts[self.rank], pointer, counts[0], dtype, stream)
                return
            with self._group():
                for root, (start, count) in enumerate(zip(starts, counts, strict=True)):
                    if count:
                        comm.broadcast(start, start, count, dtype, root, stream)

        return self._queue.start("all-gather", (tensor,), call)

    def all_to_all(
        self,
        outgoing: torch.Tensor,
        sent: Sequence[int],
        incoming: torch.Tensor,
        received: Sequence[int],
    ) -> Pending:
        _, _, dtype = self._buffer(outgoing)
        self._buffer(incoming)
        counts, starts = _shards(outgoing, sent, self.size)
        coming, places = _shards(incoming, received, self.size)
        stream = self.stream.cuda_stream
        peers = [peer for peer in range(self.size) if peer != self.rank]

        def call(comm: Any) -> None:
            with self._group():
                for peer in peers:
                    if counts[peer]:
                        comm.send(starts[peer], counts[peer], dtype, peer, stream)
                    if coming[peer]:
                        comm.recv(places[peer], coming[peer], dtype, peer, stream)

        return self._queue.start("all-to-all", (outgoing, incoming), call)

    # ------------------------------------------------------------------ waiting and ending

    def synchronize(self, timeout_s: float) -> None:
        """Wait on the host until all operations started so far are done, or abort.

        Call it before the host waits for the GPU in any other way (``.item()``, a copy to the
        host): that wait would have no deadline.

        Raises:
            DeadlineError, AbortedError, TransportError: as :meth:`Pending.wait`.
        """
        self._queue.synchronize(timeout_s)

    def abort(self) -> None:
        """Break all operations; from any thread, and without waiting.

        Waits on this transport end within milliseconds.  The communicator is taken down in the
        background: NCCL does that when its kernels have left the stream, and these may stand
        behind others.  A peer notices by itself if the network tells it; it should be told to
        abort too, as NCCL asks.
        """
        self._queue.abort("this side aborted it")

    def close(self) -> None:
        """Wait until all operations are done, then give up the communicator in the background.

        Never raises: if they are not done within ``deadline_s``, or failed, this is an abort.
        """
        self._queue.close(self._deadline_s)

    # ------------------------------------------------------------------ arguments

    def _check_peer(self, peer: int) -> None:
        if not 0 <= peer < self.size:
            raise ValueError(f"rank {peer} is not in group {self._name} of {self.size}")

    def _message(self, tensor: torch.Tensor, peer: int) -> tuple[int, int, int]:
        self._check_peer(peer)
        if peer == self.rank:
            raise ValueError(f"rank {peer} can send to itself by exchange() only")
        return self._buffer(tensor)

    def _buffer(self, tensor: torch.Tensor) -> tuple[int, int, int]:
        """Address, number of elements and NCCL data type of ``tensor``."""
        if not tensor.is_contiguous():
            raise ValueError(f"a contiguous tensor is needed, not strides {tensor.stride()}")
        if tensor.get_device() != self._device:
            raise ValueError(f"tensor is on {tensor.device}, transport on device {self._device}")
        if tensor.dtype not in _DTYPES:
            raise ValueError(f"{tensor.dtype} can't be sent over NCCL: view it as another type")
        return tensor.data_ptr(), tensor.numel(), getattr(self._nccl, _DTYPES[tensor.dtype])

    @contextmanager
    def _group(self) -> Iterator[None]:
        """What is called inside is one operation for NCCL; it goes by thread."""
        self._nccl.groupStart()
        try:
            yield
        finally:
            self._nccl.groupEnd()


def _shards(
    tensor: torch.Tensor, shards: Sequence[int], size: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Number of elements and address of each rank's shard of a flat ``tensor``."""
    if tensor.dim() != 1 or len(shards) != size or min(shards) < 0 or sum(shards) != tensor.numel():
        raise ValueError(
            f"shards {list(shards)} don't cut a tensor of shape {tuple(tensor.shape)} for {size} "
            "ranks: give a flat tensor, and one shard a rank that add up to it"
        )
    before = accumulate(shards[:-1], initial=0)
    starts = tuple(tensor.data_ptr() + count * tensor.element_size() for count in before)
    return tuple(shards), starts


# ---------------------------------------------------------------------- CuPy


def _import_nccl() -> Any:
    """CuPy's NCCL module; raises ClusterError if CuPy or the NCCL library is missing."""
    how = "install ray-train-geo[gpu], or choose the gloo transport"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that NCCL is missing is an error here, not a warning
            from cupy.cuda import nccl
    except ImportError as e:
        raise ClusterError(
            f"the nccl transport needs CuPy, and it can't be imported ({first_line(e)}): {how}"
        ) from e
    if not nccl.available:
        raise ClusterError(f"the nccl transport needs an NCCL library, and CuPy finds none: {how}")
    return nccl


def _communicator(nccl: Any, size: int, unique_id: UniqueId, rank: int, device: int) -> Any:
    """Join; NCCL takes the thread's current device, which CuPy sets by a runtime of its own."""
    from cupy.cuda import runtime

    runtime.setDevice(device)
    return nccl.NcclCommunicator(size, unique_id, rank)


def _share_unique_id(nccl: Any, store: Store, rank: int, deadline_s: float, what: str) -> UniqueId:
    """Rank 0 makes the group's unique id, the others read it."""
    key = "unique_id"
    try:
        if rank == 0:
            unique_id: UniqueId = nccl.get_unique_id()
            store.set(key, _encode(unique_id))
            return unique_id
        store.wait([key], timedelta(seconds=max(deadline_s, 0.001)))  # zero would mean for ever
        return _decode(store.get(key))
    except RuntimeError as e:  # CuPy's NcclError and torch's DistError are
        if re.search("timed? ?out", str(e), re.IGNORECASE):
            raise DeadlineError(
                f"{what}: rank 0 published no unique id within {deadline_s:.1f} s"
            ) from e
        raise TransportError(f"{what}: {first_line(e)}") from e


def _encode(unique_id: UniqueId) -> str:
    """JSON that keeps the form: CuPy takes back only the form that its version gives out."""
    return json.dumps(unique_id.hex() if isinstance(unique_id, bytes) else unique_id)


def _decode(stored: bytes) -> UniqueId:
    value = json.loads(stored)
    return bytes.fromhex(value) if isinstance(value, str) else tuple(value)
