"""One NCCL communicator with its CUDA stream and its thread: launch, wait, abort.

    caller      ──start──event──┐ (returns at once)         ┌──wait: stream waits for event──▶
    thread                      └──wait event, NCCL call────┤
    comm stream                         ░░░░ bytes move ░░░░┘

The thread is there because NCCL opens connections at the first use, and its call then blocks the
host until the peer has made the matching call: a worker that posts receives on both edges before
it computes would wait in a circle.  It also keeps all calls on a communicator in one thread, as
NCCL asks ("Thread Safety" in its user guide).

Nothing here imports CuPy: a communicator is what ``cupy.cuda.nccl.NcclCommunicator`` is.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

import torch
from torch import cuda

from ray_train_geo.errors import AbortedError, DeadlineError, TransportError

__all__ = ["NcclQueue", "Operation", "first_line"]

_POLL_S = 0.001
_STUCK_S = 0.1  # longer than this, the thread is not finishing a call but stuck in one
_HIGH_PRIORITY = -1


class NcclQueue:
    """Operations on one communicator, in the order in which they were started.

    Every error aborts the communicator, so that whoever else waits on it is released.

    Args:
        create: makes the communicator; runs in the queue's thread, and may block.
        device: index of the CUDA device.
        where: the group and the rank, for messages.
        deadline_s: longest wait for ``create``, in seconds.

    Attributes:
        stream: what all operations run on.

    Raises:
        DeadlineError: a rank did not join in time.  The call that waits for it can't be ended
            (CuPy has no non-blocking communicators): its daemon thread stays, and aborts the
            communicator should it come about after all.
        TransportError: NCCL refused.
    """

    def __init__(
        self, create: Callable[[], Any], device: int, where: str, deadline_s: float
    ) -> None:
        self._device = device
        self._where = where
        # Transfers go before computation: somebody far away waits for them.
        self.stream = cuda.Stream(device=device, priority=_HIGH_PRIORITY)
        self._operations: SimpleQueue[Operation | None] = SimpleQueue()
        self._last: Operation | None = None

        # Guards the next three.  No CUDA call is made under it: one that blocks must not keep
        # abort() waiting.
        self._lock = threading.Lock()
        self._communicator: Any = None
        self._ended: str | None = None  # why no operation may start any more
        self._aborted = False

        self._refusal: Exception | None = None
        self._joined = threading.Event()
        self._thread = threading.Thread(
            target=self._run, args=(create,), name=f"nccl {where}", daemon=True
        )
        self._thread.start()
        if not self._joined.wait(deadline_s):
            raise self._fail(
                DeadlineError(f"joining {where}: not all ranks came within {deadline_s:.1f} s")
            )
        if self._refusal is not None:
            raise TransportError(f"joining {where}: {first_line(self._refusal)}") from self._refusal

    # ------------------------------------------------------------------ the caller's side

    def start(
        self, verb: str, tensors: tuple[torch.Tensor, ...], call: Callable[[Any], None]
    ) -> Operation:
        """Queue ``call(communicator)``, to run behind what the current stream does now.

        Raises:
            AbortedError: the queue was aborted or closed.
        """
        operation = Operation(self, f"{verb} in {self._where}", tensors, call)
        if self._ended is None:
            operation.ready.record(cuda.current_stream(self._device))
            for tensor in tensors:
                tensor.record_stream(self.stream)  # its memory is not reused before we are done
        with self._lock:
            if self._ended is not None:
                raise AbortedError(f"{operation.what}: {self._ended}")
            self._operations.put(operation)
            self._last = operation
        return operation

    def synchronize(self, timeout_s: float) -> None:
        """Wait on the host until all operations started so far are done, or abort."""
        last = self._last
        if last is None:
            self.check(f"waiting in {self._where}")
            return
        until = time.monotonic() + timeout_s
        last.wait_for_launch(until, timeout_s)
        while not self._is_done(last):
            self.check(last.what)
            if time.monotonic() >= until:
                raise self._fail(
                    DeadlineError(f"{last.what}: nothing came within {timeout_s:.1f} s")
                )
            time.sleep(_POLL_S)
        self.check(last.what)  # an aborted operation ends too, without its bytes

    def make_current_stream_wait(self, operation: Operation) -> None:
        """Whatever the caller enqueues from now on finds ``operation`` done."""
        cuda.current_stream(self._device).wait_event(operation.done)

    def check(self, what: str) -> None:
        """Raise if the queue was aborted, or if NCCL has found an error meanwhile."""
        with self._lock:  # so that nobody frees the communicator while it is asked
            if self._aborted:
                raise AbortedError(f"{what}: {self._ended}")
            if self._communicator is None:
                return  # closed, with all operations done
            try:
                self._communicator.check_async_error()
                return
            except Exception as e:
                cause = e
        raise self._fail(TransportError(f"{what}: {first_line(cause)}")) from cause

    def check_deadline(self, what: str, until: float, timeout_s: float) -> None:
        """Abort if it is later than ``until`` (as ``time.monotonic``)."""
        if time.monotonic() >= until:
            raise self._fail(
                DeadlineError(f"{what}: the peer did not join within {timeout_s:.1f} s")
            )

    def close(self, timeout_s: float) -> None:
        """Wait until all operations are done, then destroy the communicator in the background.

        Never raises: if they are not done within ``timeout_s``, or failed, the queue is aborted.
        """
        with self._lock:
            if self._ended is not None:
                return
            self._ended = "this side closed it"
        try:
            self.synchronize(timeout_s)
        except TransportError:
            return  # and has been aborted
        self._operations.put(None)

    def abort(self, why: str) -> None:
        """Release all waiters here, and take the communicator down in the background."""
        with self._lock:
            if self._aborted:
                return
            self._aborted = True
            self._ended = why
        self._operations.put(None)
        threading.Thread(
            target=self._abort_if_stuck, name=f"nccl abort {self._where}", daemon=True
        ).start()

    def _fail(self, error: TransportError) -> TransportError:
        """Abort because of ``error``, which the caller raises."""
        self.abort(f"it was aborted after: {error}")
        return error

    def _is_done(self, operation: Operation) -> bool:
        try:
            return bool(operation.done.query())
        except RuntimeError as e:  # the CUDA context is broken
            raise self._fail(TransportError(f"{operation.what}: {first_line(e)}")) from e

    # ------------------------------------------------------------------ the thread's side

    def _run(self, create: Callable[[], Any]) -> None:
        try:
            cuda.set_device(self._device)
            communicator = create()
        except Exception as e:
            self._refusal = e
            self._joined.set()
            return
        with self._lock:
            self._communicator = communicator
        self._joined.set()
        while (operation := self._operations.get()) is not None and not self._aborted:
            self._launch(operation, communicator)
        owned = self._take_communicator()
        if owned is None:
            return
        if self._aborted:
            owned.abort()
        else:
            owned.destroy()

    def _launch(self, operation: Operation, communicator: Any) -> None:
        try:
            self.stream.wait_event(operation.ready)
            operation.call(communicator)
            operation.done.record(self.stream)
        except Exception as e:
            if self._aborted:  # which is why the call failed
                operation.error = AbortedError(f"{operation.what}: {self._ended}")
            else:
                operation.error = TransportError(f"{operation.what}: {first_line(e)}")
            operation.error.__cause__ = e
            self._fail(operation.error)
        finally:
            operation.tensors = ()
            operation.launched.set()

    def _abort_if_stuck(self) -> None:
        """Abort under the feet of a thread that is stuck in a call.

        NCCL wants nobody to be in a call on a communicator that is aborted, so the thread does it
        itself when it can.  But a call that waits for a lost peer ends by this only.
        """
        self._thread.join(_STUCK_S)
        communicator = self._take_communicator()
        if communicator is not None:
            communicator.abort()

    def _take_communicator(self) -> Any:
        """The communicator, to one caller only: it is aborted or destroyed once."""
        with self._lock:
            communicator, self._communicator = self._communicator, None
        return communicator


class Operation:
    """An operation under way; see :class:`ray_train_geo.transport.base.Pending`.

    It keeps its tensors alive until NCCL has them; from then on the allocator does.
    """

    __slots__ = ("_queue", "call", "done", "error", "launched", "ready", "tensors", "what")

    def __init__(
        self,
        queue: NcclQueue,
        what: str,
        tensors: tuple[torch.Tensor, ...],
        call: Callable[[Any], None],
    ) -> None:
        self._queue = queue
        self.what = what
        self.tensors = tensors
        self.call = call
        self.ready = cuda.Event()  # the caller's stream has come to this operation
        self.done = cuda.Event()  # means something once launched: before, it would count as done
        self.launched = threading.Event()
        self.error: TransportError | None = None

    def wait(self, timeout_s: float) -> None:
        """Make the current stream wait for the operation; the host waits for its launch only.

        Raises:
            DeadlineError, AbortedError, TransportError: as the protocol says.
        """
        self.wait_for_launch(time.monotonic() + timeout_s, timeout_s)
        self._queue.check(self.what)
        self._queue.make_current_stream_wait(self)

    def wait_for_launch(self, until: float, timeout_s: float) -> None:
        """Return once NCCL has put the operation on the stream; ``until`` is monotonic time."""
        while not self.launched.wait(_POLL_S):
            self._queue.check(self.what)
            self._queue.check_deadline(self.what, until, timeout_s)
        if self.error is not None:
            raise self.error


def first_line(error: Exception) -> str:
    """Type and first line of an error; torch's come with stacks."""
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
