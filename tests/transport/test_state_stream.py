"""State over TCP: the same bits, or a refusal."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from ray_train_geo.errors import AbortedError, DeadlineError, TransportError
from ray_train_geo.transport.state_stream import Address, StateServer, Streams

TENSORS = {
    "a": torch.arange(300_000, dtype=torch.float32).view(300, 1000),
    "empty": torch.zeros(0, 3),
    "scalar": torch.tensor(2.5),
    "half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "strided": torch.arange(12.0).view(3, 4).T,
}


class Shelf:
    def __init__(self) -> None:
        self.taken: list[tuple[int, int, dict[str, Any], dict[str, torch.Tensor]]] = []

    def give(self, generation: int, step: int, names: Sequence[str]) -> Mapping[str, torch.Tensor]:
        self.check(generation, step)
        return {name: TENSORS[name] for name in names}

    def check(self, generation: int, step: int) -> None:
        if (generation, step) != (3, 7):
            raise TransportError(f"not {generation}/{step} here")

    def room(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(tuple(shape), dtype=dtype)

    def take(
        self, generation: int, step: int, facts: Mapping[str, Any], tensors: dict[str, torch.Tensor]
    ) -> None:
        self.check(generation, step)
        self.taken.append((generation, step, dict(facts), tensors))


@pytest.fixture
def shelf() -> Shelf:
    return Shelf()


@pytest.fixture
def server(shelf: Shelf) -> Iterator[StateServer]:
    server = StateServer("127.0.0.1", shelf)
    yield server
    server.close()


def same(found: Mapping[str, torch.Tensor], names: Sequence[str]) -> bool:
    return list(found) == list(names) and all(
        found[n].dtype == TENSORS[n].dtype and torch.equal(found[n], TENSORS[n]) for n in names
    )


def test_what_is_fetched_has_the_same_bits(server: StateServer) -> None:
    assert same(Streams(3, 5.0).fetch(server.address, 7, list(TENSORS)), list(TENSORS))
    assert Streams(3, 5.0).fetch(server.address, 7, []) == {}


def test_several_sources_at_once(server: StateServer) -> None:
    other = StateServer("127.0.0.1", Shelf())
    found = Streams(3, 5.0).fetch_all({server.address: ["a", "scalar"], other.address: ["half"]}, 7)
    other.close()
    assert same(found, ["a", "scalar", "half"])
    assert Streams(3, 5.0).fetch_all({}, 7) == {}


def test_what_is_pushed_is_there_when_push_returns(server: StateServer, shelf: Shelf) -> None:
    Streams(3, 5.0).push(server.address, 7, {"updates": 6}, TENSORS)
    ((generation, step, facts, tensors),) = shelf.taken
    assert (generation, step, facts) == (3, 7, {"updates": 6})
    assert same(tensors, list(TENSORS))


@pytest.mark.parametrize(("generation", "step"), [(2, 7), (3, 8)])
def test_another_generation_or_step_is_refused(
    server: StateServer, shelf: Shelf, generation: int, step: int
) -> None:
    with pytest.raises(TransportError, match="refuses: not"):
        Streams(generation, 5.0).fetch(server.address, step, ["a"])
    with pytest.raises(TransportError, match=r"refuses|closed|reset"):
        Streams(generation, 5.0).push(server.address, step, {}, TENSORS)
    assert not shelf.taken


def test_a_server_that_is_gone(server: StateServer) -> None:
    server.close()
    with pytest.raises(TransportError, match=str(server.address.port)):
        Streams(3, 5.0).fetch(server.address, 7, ["a"])


def test_silence_has_a_deadline() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = Address("127.0.0.1", listener.getsockname()[1])
        with pytest.raises(DeadlineError, match=r"nothing moved for 0\.2 s"):
            Streams(3, 0.2).fetch(address, 7, ["a"])


def test_an_abort_ends_what_is_under_way_and_what_would_begin() -> None:
    streams = Streams(3, 30.0)
    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(2) as pool:
        address = Address("127.0.0.1", listener.getsockname()[1])  # it never answers, as if frozen
        large = {"w": torch.zeros(2**24)}
        waiting = [
            pool.submit(streams.fetch, address, 7, ["a"]),
            pool.submit(streams.push, address, 7, {}, large),
        ]
        time.sleep(0.2)
        assert not any(one.done() for one in waiting)
        streams.abort()
        for one in waiting:
            with pytest.raises(AbortedError):
                one.result(2.0)
        with pytest.raises(AbortedError):
            streams.fetch(address, 7, ["a"])


def test_what_is_no_state_message_harms_nobody(server: StateServer) -> None:
    for garbage in (b"GET / HTTP/1.1\r\n\r\n", b"\0\0\0\4{{{{", b"\0"):
        with socket.create_connection(server.address) as connection:
            connection.sendall(garbage)
            with contextlib.suppress(OSError):  # it may have been cut off already
                connection.shutdown(socket.SHUT_WR)
                assert connection.recv(1) == b""
    assert same(Streams(3, 5.0).fetch(server.address, 7, ["a"]), ["a"])
    assert not [t for t in threading.enumerate() if t.name.startswith("fetch-state")]
