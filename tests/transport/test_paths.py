"""When bytes leave over paths: without a clock."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_train_geo.schedule.timeline import Hop, PrivateWire
from ray_train_geo.transport.paths import Path, TokenBucket

figures = st.floats(1e-9, 1e-3)


def path(latency_s: float, *seconds_per_byte: float) -> Path:
    return Path(latency_s, [TokenBucket(s) for s in seconds_per_byte], threading.Lock())


@given(figures, st.integers(1, 10_000), st.lists(st.floats(0, 10), max_size=20))
def test_a_link_of_its_own_is_what_the_engine_takes_it_for(
    per_byte: float, size: int, ready_s: list[float]
) -> None:
    link, wire = path(0.0, per_byte), PrivateWire(Hop(0.0, size * per_byte))
    for when_s in sorted(ready_s):
        turns = list(link.leave(size, when_s))
        assert turns == sorted(turns)
        assert turns[-1] == pytest.approx(wire.send(when_s), rel=1e-9)


@given(
    st.lists(figures, min_size=1, max_size=3),
    figures,
    st.lists(
        st.tuples(st.integers(0, 2), st.floats(0, 1), st.integers(1, 10_000)),
        min_size=1,
        max_size=30,
    ),
)
def test_no_bucket_is_ever_too_fast(
    links: list[float], shared: float, messages: list[tuple[int, float, int]]
) -> None:
    nic, lock = TokenBucket(shared), threading.Lock()
    paths = [Path(0.0, (TokenBucket(link), nic), lock) for link in links]
    left: list[tuple[float, float]] = []
    for number, ready_s, size in messages:
        link = paths[number % len(paths)]
        left_s = list(link.leave(size, ready_s))[-1]
        assert left_s >= ready_s + size * max(links[number % len(links)], shared) * (1 - 1e-9)
        left.append((ready_s, size))
    # The NIC has carried everything: not before the first was there plus all bytes.
    total_s = sum(size for _, size in left) * shared
    assert nic.free_s >= min(ready for ready, _ in left) + total_s * (1 - 1e-9)


def test_links_take_turns_on_a_shared_nic() -> None:
    nic, lock = TokenBucket(1e-6), threading.Lock()
    a, b = (Path(0.0, (TokenBucket(1e-7), nic), lock) for _ in range(2))
    one, other = a.leave(100_000, 0.0), b.leave(100_000, 0.0)
    ends = [next(turn) for _ in range(20) for turn in (one, other)]
    assert ends == pytest.approx([0.005 * (i + 1) for i in range(40)])


def test_a_path_counts_bytes_and_the_time_in_which_there_were_any() -> None:
    link = path(0.1, 1e-6)
    list(link.leave(1000, 5.0))
    list(link.leave(3000, 5.0))  # behind the first
    list(link.leave(1000, 9.0))
    assert link.traffic.size_bytes == 5000
    assert link.traffic.busy_s == pytest.approx(0.005)
