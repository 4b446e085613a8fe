"""Rounds of a probe, and what readings tell of a link."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_train_geo.cluster.probing import (
    Place,
    Reading,
    hurried,
    region_links,
    rounds,
    sampled,
    spread,
)
from ray_train_geo.cluster.topology import DEFAULT_LINK, Link


@st.composite
def places(draw: st.DrawFn) -> list[Place]:
    count = draw(st.integers(1, 9))
    return [
        Place(f"n{i}", f"r{draw(st.integers(0, 3))}", f"m{draw(st.integers(0, count))}")
        for i in range(count)
    ]


@given(places())
def test_every_directed_pair_is_measured_once_and_alone_on_its_way(found: list[Place]) -> None:
    at = {place.node: place for place in found}
    plan = rounds(found)
    pairs = [pair for one in plan for pair in one]
    assert sorted(pairs) == sorted(itertools.permutations(at, 2))
    for one in plan:
        for (a, b), (c, d) in itertools.combinations(one, 2):
            assert not {at[a].machine, at[b].machine} & {at[c].machine, at[d].machine}
            ways = [(at[x].region, at[y].region) for x, y in ((a, b), (c, d))]
            assert ways[0] != ways[1] or ways[0][0] == ways[0][1]


def test_machines_of_one_region_are_measured_side_by_side() -> None:
    found = [Place(f"n{i}", "ohio", f"m{i}") for i in range(8)]
    assert len(rounds(found)) <= 2 * 8


@given(places(), st.integers(1, 20))
def test_a_sample_has_every_pair_of_regions(found: list[Place], most: int) -> None:
    region = {place.node: place.region for place in found}
    plan = sampled(found, most)
    pairs = {pair for one in plan for pair in one}
    assert {(region[a], region[b]) for a, b in pairs} == {
        (region[a], region[b]) for a, b in itertools.permutations(region, 2)
    }
    fewest = sampled(found, 1)
    assert len(plan) <= max(most, len(fewest))
    if len(rounds(found)) <= most:
        assert plan == rounds(found)


def test_one_flow_that_gets_less_than_several_has_a_window() -> None:
    link = Reading(0.1, 1e7, 1e8, 1.0, 1000).link()
    assert link == Link(0.05, 1e8, 1e6)
    assert link.flow_bytes_per_s == pytest.approx(1e7)
    free = Reading(0.1, 9e7, 1e8, 1.0, 1000).link()
    assert free.flow_bytes_per_s == 9e7
    assert math.isinf(free.window_bytes)


def test_a_region_pairs_link_is_the_median() -> None:
    found = [Place("a", "x", "a"), Place("b", "y", "b"), Place("c", "y", "c"), Place("d", "y", "d")]
    links = {("a", n): Link(i, 10.0 * i) for i, n in enumerate("bcd", 1)}
    assert region_links(found, links) == {("x", "y"): Link(2, 20.0)}


@given(places(), st.data())
def test_a_hurried_probe_keeps_its_budget_and_measures_machines_that_can(
    found: list[Place], data: st.DataObject
) -> None:
    at = {place.node: place for place in found}
    sources = data.draw(st.sets(st.sampled_from(sorted(at))))
    budget_s = data.draw(st.floats(0, 30))

    def seconds(pair: tuple[str, str]) -> float:
        return 1.0 + (at[pair[0]].region != at[pair[1]].region)

    plan = hurried(found, sources, seconds, budget_s)
    assert sum(max(map(seconds, one)) for one in plan) <= budget_s
    pairs = [pair for one in plan for pair in one]
    assert len(set(pairs)) == len(pairs)
    assert all(a in sources and at[a].machine != at[b].machine for a, b in pairs)
    everything = [pair for one in hurried(found, sources, seconds, math.inf) for pair in one]
    assert sorted(everything) == sorted(
        (a, b)
        for a, b in itertools.permutations(at, 2)
        if a in sources and at[a].machine != at[b].machine
    )


def test_a_hurried_probe_looks_at_each_two_regions_first() -> None:
    found = [Place(f"{region}{i}", region, f"{region}{i}") for region in "xyz" for i in range(2)]
    first, second, *_ = hurried(found, [p.node for p in found], lambda pair: 1.0, 3.0)
    ways = [{a[0], b[0]} for a, b in (*first, *second)]
    assert {"x", "y"} in ways
    assert len(hurried(found, ["x0"], lambda pair: 1.0, 2.5)) == 2


def test_what_was_not_measured_is_as_its_like() -> None:
    found = [Place("a", "x", "a"), Place("b", "y", "b"), Place("c", "y", "c"), Place("d", "z", "d")]
    readings = {("a", "b"): Reading(0.1, 1e7, 1e7, 1.0, 1000)}
    trips = {("a", "b"): 0.1, ("b", "a"): 0.1, ("c", "a"): 0.2, ("a", "d"): 0.3}
    links = spread(found, readings, trips)
    assert links["a", "b"] == links["b", "a"] == Link(0.05, 1e7)
    assert links["c", "a"] == Link(0.1, 1e7), "as others of the two regions, the other way"
    assert links["a", "d"] == Link(0.15, DEFAULT_LINK.bandwidth_bytes_per_s)
