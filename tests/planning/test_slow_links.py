from __future__ import annotations

from collections.abc import Callable

import pytest

from ray_train_geo.planning.slow_links import LinkChange, NodePair, SlowLinkWatch, Traffic

A, B = ("a", "b"), ("b", "a")
MB = 2**20


def watched(
    rate: Callable[[NodePair, float], float], busy: float = 0.5, seconds: float = 80.0
) -> list[tuple[float, LinkChange]]:
    """Each link is busy for a share of the time, at ``rate(pair, time)`` in bytes per second."""
    watch, found = SlowLinkWatch(), []
    for i in range(int(seconds)):
        now_s = float(i)
        carried = {pair: Traffic(busy * rate(pair, now_s), busy) for pair in (A, B)}
        found += [(now_s, change) for change in watch.add(now_s, carried)]
    return found


def test_a_link_that_drops_to_a_tenth_for_good_is_noticed() -> None:
    ((when_s, change),) = watched(lambda p, t: MB if p == A and t >= 40 else 10 * MB)
    assert change.pair == A
    assert change.ratio == pytest.approx(10)
    assert change.bytes_per_s == pytest.approx(MB)
    assert 47 <= when_s <= 51


@pytest.mark.parametrize("dip_s", [1, 3, 5])
def test_a_short_dip_changes_nothing(dip_s: float) -> None:
    assert watched(lambda p, t: MB if p == A and 40 <= t < 40 + dip_s else 10 * MB) == []


def test_a_link_that_comes_back_is_noticed_too() -> None:
    found = watched(lambda p, t: MB if p == A and 40 <= t < 80 else 10 * MB, seconds=130)
    assert [round(c.ratio, 3) for _, c in found] == [10, 0.1]


def test_a_link_that_is_hardly_busy_is_not_judged() -> None:
    assert watched(lambda p, t: MB if p == A and t >= 40 else 10 * MB, busy=0.01) == []


def test_what_is_in_use_and_as_it_was_is_sound() -> None:
    watch = SlowLinkWatch()
    for i in range(44):
        slow = MB if i > 40 else 10 * MB
        watch.add(float(i), {A: Traffic(slow, 1.0), B: Traffic(10 * MB, 1.0)})
    assert watch.sound == {B}


def test_traffic_adds_up() -> None:
    assert Traffic(3, 2.0) + Traffic(1, 0.5) - Traffic(2, 1.0) == Traffic(2, 1.5)
