"""State from worker to worker: raw tensor bytes over a TCP connection, in frames.

    get   ▶ {"verb", "generation", "step", "names"}     put   ▶ {..., "tensors"}, then the bytes
          ◀ {"tensors"}, then the bytes                       ◀ {}
          ◀ {"error"}                                         ◀ {"error"}

A frame is the length of its JSON header (4 bytes, big-endian) and the header; ``tensors`` lists
name, dtype and shape of what follows.  Both sides name generation and step, and what does not
match is refused: state of an old generation never gets into a new one.
"""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

import torch

from ray_train_geo.errors import AbortedError, DeadlineError, TransportError

__all__ = ["Address", "Shelf", "StateServer", "Streams"]

_BACKLOG = 64
_LENGTH = struct.Struct("!I")
_LONGEST_HEADER = 64 * 2**20
_SERVER_DEADLINE_S = 120.0
_SOCKET_BUFFER_BYTES = 4 * 2**20
_PARALLEL = 8


class Address(NamedTuple):
    """Where a :class:`StateServer` listens."""

    host: str
    port: int


class Shelf(Protocol):
    """What a server gives from and puts on; called from its threads."""

    def give(self, generation: int, step: int, names: Sequence[str]) -> Mapping[str, torch.Tensor]:
        """The tensors called ``names``; they must not change before they have been sent.

        Raises:
            TransportError: they are not there, or not of this generation and step.
        """

    def check(self, generation: int, step: int) -> None:
        """Whether :meth:`take` would take a copy; asked before its bytes are read.

        Raises:
            TransportError: it is of another generation.
        """

    def room(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Where a tensor of a copy goes, on the CPU and contiguous."""

    def take(
        self, generation: int, step: int, facts: Mapping[str, Any], tensors: dict[str, torch.Tensor]
    ) -> None:
        """Keep a copy of a peer's state: all of it has arrived.

        Raises:
            TransportError: it is of another generation.
        """


class StateServer:
    """Serves a :class:`Shelf`, a thread a connection, until it is closed."""

    def __init__(self, hostname: str, shelf: Shelf) -> None:
        self._shelf = shelf
        self._listener = socket.create_server((hostname, 0), backlog=_BACKLOG)
        self.address = Address(hostname, self._listener.getsockname()[1])
        threading.Thread(target=self._serve, name="state", daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                connection, _ = self._listener.accept()
                threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        # A peer that is gone needs no answer.
        with contextlib.suppress(OSError, TransportError), connection:
            _prepare(connection, _SERVER_DEADLINE_S)
            request = _receive_header(connection)
            generation, step = request["generation"], request["step"]
            try:
                if request["verb"] == "put":
                    self._shelf.check(generation, step)
                    tensors = _receive_tensors(connection, request["tensors"], self._shelf.room)
                    self._shelf.take(generation, step, request["facts"], tensors)
                    found: Mapping[str, torch.Tensor] = {}
                else:
                    found = self._shelf.give(generation, step, request["names"])
            except TransportError as e:
                _send_header(connection, {"error": str(e)})
                return
            _send_header(connection, {"tensors": _described(found)})
            _send_tensors(connection, found)

    def close(self) -> None:
        # A blocked accept() ends by shutdown only.
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


class Streams:
    """A worker's own fetches and pushes in one generation; :meth:`abort` ends them at once.

    Args:
        deadline_s: longest silence of a peer, in seconds.
    """

    def __init__(self, generation: int, deadline_s: float) -> None:
        self._generation = generation
        self._deadline_s = deadline_s
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._aborted = False

    def fetch(self, address: Address, step: int, names: Sequence[str]) -> dict[str, torch.Tensor]:
        """The tensors called ``names`` from the server at ``address``, on the CPU.

        Raises:
            AbortedError: by :meth:`abort`.
            DeadlineError: nothing came for so long.
            TransportError: the server is gone, or refuses.
        """
        with self._connected(address) as connection:
            request = {"verb": "get", "generation": self._generation, "step": step}
            _send_header(connection, {**request, "names": list(names)})
            return _receive_tensors(connection, _reply(connection, address)["tensors"], _fresh)

    def fetch_all(
        self, sources: Mapping[Address, Sequence[str]], step: int
    ) -> dict[str, torch.Tensor]:
        """As :meth:`fetch`, from several servers at once.

        Raises:
            AbortedError, DeadlineError, TransportError: of the first source that failed.
        """
        found: dict[str, torch.Tensor] = {}
        if not sources:
            return found
        with ThreadPoolExecutor(min(_PARALLEL, len(sources)), "fetch-state") as pool:
            streams = [
                pool.submit(self.fetch, address, step, names) for address, names in sources.items()
            ]
            for stream in streams:
                found |= stream.result()
        return found

    def push(
        self,
        address: Address,
        step: int,
        facts: Mapping[str, Any],
        tensors: Mapping[str, torch.Tensor],
    ) -> None:
        """Leave a copy of ``tensors`` (on the CPU) at ``address``; returns once it is there.

        Args:
            facts: what goes with the tensors, as plain JSON.

        Raises:
            AbortedError, DeadlineError, TransportError: as :meth:`fetch`.
        """
        with self._connected(address) as connection:
            _send_header(
                connection,
                {
                    "verb": "put",
                    "generation": self._generation,
                    "step": step,
                    "facts": dict(facts),
                    "tensors": _described(tensors),
                },
            )
            # A server that refuses says so and closes: its word is better than the broken pipe.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                _send_tensors(connection, tensors)
            _reply(connection, address)

    def abort(self) -> None:
        """End all that is under way, and what begins later; from any thread."""
        with self._lock:
            self._aborted = True
            connections = list(self._open)
        for connection in connections:
            # Also one that is still being made, or whose peer is frozen or cut off.
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    @contextlib.contextmanager
    def _connected(self, address: Address) -> Iterator[socket.socket]:
        where = f"state from or to {address.host}:{address.port}"
        try:
            family, kind, protocol, _, place = socket.getaddrinfo(
                *address, type=socket.SOCK_STREAM
            )[0]
            with socket.socket(family, kind, protocol) as connection:
                with self._lock:
                    self._open.add(connection)
                    if self._aborted:
                        raise AbortedError(f"{where}: the generation was aborted")
                try:
                    _prepare(connection, self._deadline_s)
                    connection.connect(place)
                    yield connection
                finally:
                    with self._lock:
                        self._open.discard(connection)
        except OSError as e:
            if self._aborted:
                raise AbortedError(f"{where}: the generation was aborted") from None
            if isinstance(e, TimeoutError):
                message = f"{where}: nothing moved for {self._deadline_s:.1f} s"
                raise DeadlineError(message) from None
            raise TransportError(f"{where}: {e}") from None


# ---------------------------------------------------------------------- frames


def _prepare(connection: socket.socket, deadline_s: float) -> None:
    connection.settimeout(deadline_s)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BUFFER_BYTES)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _SOCKET_BUFFER_BYTES)


def _reply(connection: socket.socket, address: Address) -> Any:
    reply = _receive_header(connection)
    if "error" in reply:
        raise TransportError(f"{address.host}:{address.port} refuses: {reply['error']}")
    return reply


def _send_header(connection: socket.socket, header: Mapping[str, Any]) -> None:
    data = json.dumps(header).encode()
    connection.sendall(_LENGTH.pack(len(data)) + data)


def _receive_header(connection: socket.socket) -> Any:
    length = bytearray(_LENGTH.size)
    _fill(connection, memoryview(length))
    (size,) = _LENGTH.unpack(length)
    if size > _LONGEST_HEADER:
        raise TransportError("what came is no state message")
    data = bytearray(size)
    _fill(connection, memoryview(data))
    try:
        return json.loads(data)
    except ValueError:
        raise TransportError("what came is no state message") from None


def _described(tensors: Mapping[str, torch.Tensor]) -> list[tuple[str, str, list[int]]]:
    return [
        (name, str(t.dtype).removeprefix("torch."), list(t.shape)) for name, t in tensors.items()
    ]


def _send_tensors(connection: socket.socket, tensors: Mapping[str, torch.Tensor]) -> None:
    for tensor in tensors.values():
        if tensor.numel():
            connection.sendall(_bytes(tensor.detach().cpu().contiguous()))


def _receive_tensors(
    connection: socket.socket,
    described: Sequence[tuple[str, str, list[int]]],
    room: Callable[[Sequence[int], torch.dtype], torch.Tensor],
) -> dict[str, torch.Tensor]:
    found = {}
    for name, dtype, shape in described:
        found[name] = room(shape, getattr(torch, dtype))
        if found[name].numel():
            _fill(connection, _bytes(found[name]))
    return found


def _fresh(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(tuple(shape), dtype=dtype)


def _bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    return tensor.view(-1).view(torch.uint8).numpy().data


def _fill(connection: socket.socket, view: memoryview) -> None:
    while view:
        received = connection.recv_into(view)
        if not received:
            raise ConnectionResetError("the connection was closed")
        view = view[received:]
