"""When packets arrive: rates, delays, what is shared, and what is lost."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_train_geo.lab.fabric import Fabric, Pair, Shape

SIZE = 1500


class Wires:
    """A fabric under test: packets are their numbers, and the clock is turned by hand."""

    def __init__(self, links: dict[Pair, Shape], shared: dict[str, tuple[float, list[Pair]]]):
        self.arrived: list[tuple[float, int, int]] = []
        self.marked: set[int] = set()
        self.now_s = 0.0
        self.fabric = Fabric(links, self._deliver)
        for name, (rate, pairs) in shared.items():
            self.fabric.share(name, rate, pairs)

    def _deliver(self, host: int, packet: bytes, congested: bool) -> None:
        number = int.from_bytes(packet, "big")
        self.arrived.append((self.now_s, host, number))
        if congested:
            self.marked.add(number)

    def send(
        self, at_s: float, pair: Pair, number: int, size: int = SIZE, flow: bytes = b""
    ) -> None:
        self.run(at_s)
        self.fabric.send(at_s, pair, number.to_bytes(4, "big"), size, 1, flow)

    def run(self, until_s: float = math.inf) -> None:
        while self.fabric.next_s() <= until_s and self.fabric.next_s() < math.inf:
            self.now_s = self.fabric.next_s()
            self.fabric.advance(self.now_s)

    def times(self, host: int) -> list[float]:
        return [at for at, to, _ in self.arrived if to == host]


def two(shape: Shape, **shared: tuple[float, list[Pair]]) -> Wires:
    return Wires({(0, 1): shape, (1, 0): shape}, shared)


def test_a_packet_takes_its_size_and_the_latency() -> None:
    wires = two(Shape(0.1, 15_000))
    wires.send(0, (0, 1), 1)
    wires.send(0, (0, 1), 2)
    wires.send(5, (0, 1), 3)
    wires.run()
    assert wires.times(1) == pytest.approx([0.2, 0.3, 5.2])


def test_the_two_directions_do_not_meet() -> None:
    wires = two(Shape(0.1, 15_000))
    wires.send(0, (0, 1), 1)
    wires.send(0, (1, 0), 2)
    wires.run()
    assert wires.times(0) == wires.times(1) == pytest.approx([0.2])


def test_links_share_a_nic() -> None:
    fast = Shape(0.0, 1e9)
    pairs: list[Pair] = [(0, 1), (0, 2)]
    wires = Wires(dict.fromkeys(pairs, fast), {"NIC": (15_000, pairs)})
    for number in range(10):
        wires.send(0, pairs[number % 2], number)
    wires.run()
    assert max(at for at, _, _ in wires.arrived) == pytest.approx(10 * SIZE / 15_000, rel=1e-3)


def test_a_slow_link_does_not_hold_up_the_others_at_the_nic() -> None:
    pairs: list[Pair] = [(0, 1), (0, 2)]
    wires = Wires({(0, 1): Shape(0.0, 1500), (0, 2): Shape(0.0, 1e9)}, {"NIC": (1.5e6, pairs)})
    for number in range(10):
        wires.send(0, (0, 1), number)
    wires.send(0, (0, 2), 99)
    wires.run()
    assert wires.times(2) == pytest.approx([0.001], rel=0.1)


def test_one_connection_gets_its_window_a_round_trip() -> None:
    wires = two(Shape(0.0, 150_000, flow_bytes_per_s=15_000))
    for number in range(10):
        wires.send(0, (0, 1), number, flow=b"a")
        wires.send(0, (0, 1), 100 + number, flow=b"b")
    wires.run()
    assert max(wires.times(1)) == pytest.approx(1.0, rel=0.05)


def test_a_full_queue_marks_and_then_loses() -> None:
    wires = two(Shape(0.0, 1e6))
    for number in range(1000):
        wires.send(0, (0, 1), number)
    wires.run()
    traffic = wires.fabric.traffic()[0, 1]
    assert traffic.packets == 1000
    assert traffic.lost == 1000 - len(wires.arrived) > 0
    numbers = [n for _, _, n in wires.arrived]
    assert min(wires.marked) < len(numbers) / 2, "marks come long before losses"
    assert not wires.marked & set(range(10))


def test_cut_loses_what_is_on_its_way() -> None:
    wires = two(Shape(1.0))
    wires.send(0, (0, 1), 1)
    wires.send(2, (0, 1), 2)
    wires.fabric.cut((0, 1), True)
    wires.send(3, (0, 1), 3)
    wires.send(3, (1, 0), 4)
    wires.run(4)
    wires.fabric.cut((0, 1), False)
    wires.send(5, (0, 1), 5)
    wires.run()
    assert [n for _, to, n in wires.arrived if to == 1] == [1, 5]
    assert len(wires.times(0)) == 1, "only one direction was cut"
    assert wires.fabric.traffic()[0, 1].lost == 2


def test_a_link_changes_while_it_carries() -> None:
    wires = two(Shape(0.0, 1500))
    wires.send(0, (0, 1), 1)
    wires.send(0, (0, 1), 2)
    wires.run(1)
    wires.fabric.shape((0, 1), Shape(0.0, 15_000))
    wires.send(1, (0, 1), 3)
    wires.run()
    assert wires.times(1) == pytest.approx([1, 2, 2.1]), "the second was on the wire already"


def test_losses_are_as_many_as_asked() -> None:
    wires = two(Shape(loss=0.1))
    for number in range(5000):
        wires.send(number, (0, 1), number)
    wires.run()
    assert 0.08 < 1 - len(wires.arrived) / 5000 < 0.12


def test_who_looks_late_does_not_slow_a_link_down() -> None:
    wires = two(Shape(0.005, 150_000))
    for number in range(80):
        wires.fabric.send(0.0, (0, 1), number.to_bytes(4, "big"), SIZE, 1, b"")
    seen = []
    for look_s in (0.3, 0.7, 0.81):
        wires.fabric.advance(look_s)
        seen.append(len(wires.arrived))
    assert seen == [29, 69, 80]


packets = st.lists(
    st.tuples(st.floats(0, 0.05), st.sampled_from([(0, 1), (1, 0)]), st.integers(40, 65536)),
    max_size=60,
)
shapes = st.builds(
    Shape,
    latency_s=st.floats(0, 1),
    bytes_per_s=st.floats(1e4, 1e9),
    flow_bytes_per_s=st.floats(1e4, 1e9),
    jitter_s=st.floats(0, 0.5),
)


@given(packets, shapes, st.floats(1e4, 1e9))
def test_no_packet_is_early_nor_overtakes(
    sent: list[tuple[float, Pair, int]], shape: Shape, nic: float
) -> None:
    wires = two(shape, nic=(nic, [(0, 1), (1, 0)]))
    now, left = 0.0, {}
    for number, (gap_s, pair, size) in enumerate(sent):
        now += gap_s
        left[number] = (now, size)
        wires.send(now, pair, number, size)
    wires.run()
    traffic = wires.fabric.traffic().values()
    assert len(wires.arrived) == sum(t.packets - t.lost for t in traffic)
    slowest = min(shape.bytes_per_s, nic)
    for at, _, number in wires.arrived:
        began, size = left[number]
        assert at >= began + shape.latency_s + size / slowest - 1e-9
    for host in (0, 1):
        numbers = [n for _, to, n in wires.arrived if to == host]
        assert numbers == sorted(numbers)
