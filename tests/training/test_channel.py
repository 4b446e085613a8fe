"""One direction of an edge: order, how much is under way, who owns the tensors."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import pytest
import torch
from torch.distributed import HashStore

from ray_train_geo.errors import DeadlineError
from ray_train_geo.observe.trace import Tracer
from ray_train_geo.training.channel import Receiver, Sender
from ray_train_geo.transport.gloo import GlooEndpoint

CPU = torch.device("cpu")


class Line:
    """A two-rank transport that remembers what it was asked for; messages arrive on ``wait``."""

    rank, size = 0, 2

    def __init__(self, messages: Sequence[torch.Tensor] = ()) -> None:
        self.messages = list(messages)
        self.sent: list[torch.Tensor] = []
        self.posted: list[torch.Tensor] = []
        self.under_way = 0
        self.most_under_way = 0

    def send(self, tensor: torch.Tensor, peer: int) -> Done:
        assert tensor.is_contiguous()
        assert peer == 1
        self.sent.append(tensor.clone())
        return self._start(lambda: None)

    def recv(self, tensor: torch.Tensor, peer: int) -> Done:
        self.posted.append(tensor)
        message = self.messages[len(self.posted) - 1]
        return self._start(lambda: tensor.copy_(message))

    def _start(self, arrive: Callable[[], object]) -> Done:
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        return Done(self, arrive)

    def all_reduce(self, tensor: torch.Tensor) -> Done:
        raise AssertionError("an edge of a pipeline only sends and receives")

    def reduce_scatter(self, tensor: torch.Tensor, shards: Sequence[int]) -> Done:
        raise AssertionError("an edge of a pipeline only sends and receives")

    def all_gather(self, tensor: torch.Tensor, shards: Sequence[int]) -> Done:
        raise AssertionError("an edge of a pipeline only sends and receives")

    def synchronize(self, timeout_s: float) -> None: ...

    def abort(self) -> None: ...

    def close(self) -> None: ...


class Done:
    def __init__(self, line: Line, arrive: Callable[[], object]) -> None:
        self._line = line
        self._arrive = arrive

    def wait(self, timeout_s: float) -> None:
        assert timeout_s == 5.0
        self._line.under_way -= 1
        self._arrive()


def receiver(line: Line, ahead: int, tracer: Tracer | None = None) -> Receiver:
    return Receiver(line, 1, (2,), torch.float32, CPU, ahead, tracer or Tracer(enabled=False))


@pytest.mark.parametrize("ahead", [1, 3, 9])
def test_receives_in_order_with_at_most_so_many_posted(ahead: int) -> None:
    line = Line([torch.full((2,), float(i)) for i in range(5)])
    channel = receiver(line, ahead)
    channel.begin(step=1, messages=5)
    assert len(line.posted) == min(ahead, 5), "posted before anybody asks"
    got = [channel.receive(f"F{i}", i, 5.0) for i in range(5)]
    assert [float(t[0]) for t in got] == [0, 1, 2, 3, 4]
    # The next is posted before the oldest is waited for.
    assert line.most_under_way == min(ahead + 1, 5)
    assert len(line.posted) == 5, "not one more than will come"
    assert line.under_way == 0


def test_each_message_has_a_tensor_of_its_own() -> None:
    line = Line([torch.zeros(2), torch.ones(2)])
    channel = receiver(line, 1)
    channel.begin(1, 2)
    first = channel.receive("F0", 0, 5.0)
    channel.receive("F1", 1, 5.0)
    assert first.tolist() == [0, 0]


def test_a_second_step_begins_anew() -> None:
    line = Line([torch.full((2,), float(i)) for i in range(4)])
    channel = receiver(line, 2)
    for step in (1, 2):
        channel.begin(step, 2)
        got = [float(channel.receive("F", i, 5.0)[0]) for i in range(2)]
        assert got == [2 * step - 2, 2 * step - 1]


@pytest.mark.parametrize("limit", [1, 2, 10])
def test_sends_do_not_wait_until_the_limit(limit: int) -> None:
    line = Line()
    channel = Sender(line, 1, Tracer(enabled=False), limit)
    channel.begin(1)
    for i in range(5):
        channel.send(torch.full((2,), float(i)), f"F{i}", i, 5.0)
    assert line.most_under_way == min(limit, 5)
    assert line.under_way == min(limit, 5)
    channel.finish(5.0)
    assert line.under_way == 0
    assert [float(t[0]) for t in line.sent] == [0, 1, 2, 3, 4]


def test_a_tensor_with_gaps_is_sent_whole() -> None:
    line = Line()
    channel = Sender(line, 1, Tracer(enabled=False), 1)
    channel.send(torch.arange(4.0).view(2, 2).t(), "F0", 0, 5.0)
    assert line.sent[0].tolist() == [[0, 2], [1, 3]]


def test_spans_of_both_ends() -> None:
    tracer = Tracer()
    line = Line([torch.zeros(2)])
    out = Sender(line, 1, tracer, 2)
    out.begin(3)
    out.send(torch.zeros(2), "F0", 0, 5.0)
    out.finish(5.0)
    into = receiver(line, 1, tracer)
    into.begin(3, 1)
    into.receive("F0", 0, 5.0)
    spans = [(s.category, s.name, s.step, s.microbatch) for s in tracer.drain()]
    assert spans == [("send", "F0", 3, 0), ("receive", "F0", 3, 0)]


def test_over_real_sockets_and_a_silent_peer_is_a_deadline() -> None:
    store, ends = HashStore(), list[GlooEndpoint]()
    made = {}

    def join(rank: int) -> None:
        endpoint = GlooEndpoint(store, "127.0.0.1", 20.0)
        ends.append(endpoint)
        made[rank] = endpoint.connect("edge", rank, 2)

    threads = [threading.Thread(target=join, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    out = Sender(made[0], 1, Tracer(enabled=False), limit=4)
    into = Receiver(made[1], 0, (3,), torch.float32, CPU, 2, Tracer(enabled=False))
    into.begin(1, 4)
    for i in range(3):
        out.send(torch.full((3,), float(i)), f"F{i}", i, 5.0)
    assert [float(into.receive("F", i, 5.0)[0]) for i in range(3)] == [0, 1, 2]
    out.finish(5.0)
    with pytest.raises(DeadlineError):
        into.receive("F3", 3, 0.2)
    for endpoint in ends:
        endpoint.abort()
