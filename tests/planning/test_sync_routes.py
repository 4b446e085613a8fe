"""Routes of gradient sums: everybody's part is in every sum once, and every sum gets to all."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_train_geo.cluster.topology import Device
from ray_train_geo.planning.plan import PipelinePlan, Plan, StagePlan
from ray_train_geo.planning.sync_routes import (
    Route,
    even_shards,
    hierarchical,
    plan_route,
    route_of,
    sharded,
    shards,
    sites_of,
    tree,
)

SITES = st.lists(st.integers(0, 4), min_size=2, max_size=12)
MODES = ("sharded_ps", "central_ps", "hierarchical", "tree")


def picture(route: Route) -> list[str]:
    return [" ".join(f"{t.source}>{t.target}:{''.join(map(str, t.pieces))}" for t in r)
            for r in route.rounds]  # fmt: skip


def test_a_tree_goes_to_the_leaders_of_sites_first():
    assert picture(tree(tuple("aaabb"))) == ["1>0:0 4>3:0", "2>0:0", "3>0:0"]
    assert picture(tree(tuple("aaaaa"))) == ["1>0:0 3>2:0", "2>0:0", "4>0:0"]


def test_two_sites_of_two_halve_the_gradients_twice():
    assert picture(hierarchical(tuple("aabb"))) == [
        "0>1:23 1>0:01 2>3:23 3>2:01",  # inside: a half to each
        "0>2:1 1>3:3 2>0:0 3>1:2",  # between: a quarter of all stays with each
    ]


def test_who_is_alone_in_a_region_takes_part_in_all_lanes():
    assert picture(hierarchical(tuple("aab"))) == ["0>1:1 1>0:0", "1>2:1 2>0:0"]


def test_one_site_or_sites_of_one_make_a_sharded_server():
    one_each = hierarchical(tuple("abcd"))
    assert picture(one_each) == picture(hierarchical(tuple("aaaa")))
    assert picture(one_each) == picture(sharded((0.25,) * 4))


@given(SITES, st.sampled_from(MODES))
def test_every_member_is_in_every_sum_once(sites, mode):
    route, members = route_of(mode, sites), range(len(sites))
    pieces = range(len(route.shares))
    assert sum(route.shares) == pytest.approx(1)
    has = {(m, p): Counter({m: 1}) for m in members for p in pieces}
    for transfers in route.rounds:
        moved = [(t, p, has.pop((t.source, p))) for t in transfers for p in t.pieces]
        for t, p, parts in moved:  # who has handed a piece on gets no more of it
            has[t.target, p] += parts
    for piece in pieces:
        if route.shares[piece]:
            (whole,) = [parts for (_, p), parts in has.items() if p == piece]
            assert whole == dict.fromkeys(members, 1)
    for member in members:
        whole = {p for m, p in has if m == member and route.shares[p]}
        assert set(route.held(member)) == whole


@given(SITES)
def test_a_region_is_left_by_no_more_than_one_sum_of_its_own_and_its_part_of_others(sites):
    route, regions = hierarchical(tuple(sites)), set(sites)
    for region in regions:
        left = Counter()
        for transfers in route.rounds:
            for t in transfers:
                if sites[t.source] == region != sites[t.target]:
                    left.update(t.pieces)
        assert all(count == 1 for count in left.values())
    assert len(route.shares) <= len(sites), "no message is smaller than a sharded server's"


@given(st.integers(0, 10_000), st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_shards_are_in_proportion(elements, weights):
    total = sum(weights)
    shares = [w / total for w in weights] if total > 0 else [1 / len(weights)] * len(weights)
    found = shards(elements, shares)
    assert sum(found) == elements
    assert min(found) >= 0
    assert all(abs(n - elements * s) <= 1.5 for n, s in zip(found, shares, strict=True))


@given(st.integers(0, 10_000), st.integers(1, 50))
def test_even_shards(elements, ranks):
    found = even_shards(elements, ranks)
    assert (len(found), sum(found)) == (ranks, elements)
    assert max(found) - min(found) <= 1


def test_a_plan_says_where_members_are_and_what_they_share():
    devices = tuple(Device(f"d{i}", f"n{i % 2}", region="ab"[i // 2]) for i in range(4))
    pipelines = tuple(
        PipelinePlan((StagePlan(d.id, (0, 1), 0, shard=float(i)),), 1, i)
        for i, d in enumerate(devices)
    )
    plan = Plan(1, pipelines, "1f1b", "sharded_ps", devices, 1.0)
    assert plan_route(plan, (0, 1, 3)).shares == (0.0, 0.25, 0.75)
    assert sites_of("aab", "xyz") == ("a", "a", "b")
    assert sites_of("aaa", "xyy") == ("x", "y", "y")
    with pytest.raises(ValueError, match="no route"):
        route_of("allreduce", "ab")
