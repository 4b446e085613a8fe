from __future__ import annotations

from ray_train_geo.cluster.topology import Device, Link, Topology
from ray_train_geo.planning.corrections import Corrections
from ray_train_geo.planning.slow_links import LinkChange
from ray_train_geo.planning.stragglers import Straggler

MEASURED = Topology(
    tuple(
        Device(f"{node}/0", node, region=region, flops_per_s=1e12)
        for node, region in (("a", "ohio"), ("b", "ohio"), ("c", "tokyo"), ("d", "tokyo"))
    ),
    region_links={("ohio", "tokyo"): Link(0.1, 1e8), ("tokyo", "ohio"): Link(0.1, 1e8)},
)
A, B, C, D = MEASURED.devices


def slower(device: str, ratio: float) -> Straggler:
    return Straggler(device, ratio, ratio, 1.0)


def test_a_straggler_is_slower_until_it_has_recovered() -> None:
    known = Corrections()
    assert known.apply(MEASURED) is MEASURED
    assert known.straggler(slower("a/0", 4.0), MEASURED, 0.0)
    assert known.straggler(slower("a/0", 2.0), MEASURED, 10.0)
    assert known.apply(MEASURED).device("a/0").flops_per_s == 1e12 / 8
    assert known.apply(MEASURED).device("b/0") == B
    assert known.straggler(slower("a/0", 1 / 7), MEASURED, 20.0)
    assert known.apply(MEASURED) is MEASURED


def test_nothing_becomes_faster_than_it_was_measured() -> None:
    known = Corrections()
    assert not known.straggler(slower("a/0", 0.25), MEASURED, 0.0)
    assert known.link(LinkChange(("a", "c"), 0.1, 1e10), MEASURED, (), 0.0) == []
    assert known.apply(MEASURED) is MEASURED


def test_a_link_between_regions_is_that_of_all_their_nodes() -> None:
    known = Corrections()
    changed = known.link(LinkChange(("a", "c"), 10.0, 1e7), MEASURED, (), 0.0)
    assert set(changed) == {("a", "c"), ("a", "d"), ("b", "c"), ("b", "d")}
    now = known.apply(MEASURED)
    assert now.link(B, D) == Link(0.1, 1e7)
    assert now.link(D, B) == Link(0.1, 1e8), "the other direction is another link"
    assert now.link(A, B) == MEASURED.link(A, B)


def test_but_not_of_those_that_are_seen_to_be_sound() -> None:
    known = Corrections()
    changed = known.link(LinkChange(("a", "c"), 10.0, 1e7), MEASURED, {("b", "c"), ("b", "d")}, 0.0)
    assert set(changed) == {("a", "c"), ("a", "d")}


def test_within_a_region_it_is_that_pair() -> None:
    changed = Corrections().link(LinkChange(("a", "b"), 10.0, 1e7), MEASURED, (), 0.0)
    assert changed == [("a", "b")]


def test_a_link_that_comes_back_has_its_bandwidth_again() -> None:
    known = Corrections()
    known.link(LinkChange(("a", "c"), 10.0, 1e7), MEASURED, (), 0.0)
    assert len(known.link(LinkChange(("a", "c"), 0.1, 9e7), MEASURED, (), 0.0)) == 4
    assert known.apply(MEASURED) is MEASURED


def test_what_nobody_confirms_is_tried_again_each_time_later() -> None:
    known, now_s, paroles = Corrections(), 0.0, []
    for _ in range(3):
        known.straggler(slower("a/0", 4.0), MEASURED, now_s)
        since_s = now_s
        while not known.expire(now_s):
            now_s += 10
        paroles.append(now_s - since_s)
        assert known.apply(MEASURED) is MEASURED
    assert paroles == [300, 600, 1200]
    known.straggler(slower("b/0", 4.0), MEASURED, now_s)
    known.confirm(["b/0", ("a", "b")], now_s + 250)
    assert known.expire(now_s + 400) == []
    assert known.expire(now_s + 550) == ["b/0"]
