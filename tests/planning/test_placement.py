from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_train_geo.cluster.topology import Device, Link, Topology
from ray_train_geo.planning.placement import place


def devices(region, count, *, per_node=1, flops_per_s=1e12):
    return [
        Device(f"{region}{i}", f"{region}-{i // per_node}", region=region, flops_per_s=flops_per_s)
        for i in range(count)
    ]


def ids(chains):
    return [[d.id for d in chain] for chain in chains]


def test_pipelines_stay_in_a_region_and_on_a_node():
    t = Topology(tuple(devices("a", 4, per_node=2) + devices("b", 4, per_node=2)))
    assert ids(place(t, (4, 4), 1e6)) == [["a0", "a1", "a2", "a3"], ["b0", "b1", "b2", "b3"]]
    assert ids(place(t, (2, 2, 2, 2), 1e6)) == [
        ["a0", "a1"],
        ["a2", "a3"],
        ["b0", "b1"],
        ["b2", "b3"],
    ]


def test_a_deep_pipeline_finds_its_region_whole():
    t = Topology(tuple(devices("a", 4) + devices("b", 2)))
    # The other way round, the second pipeline would have to cross regions.
    assert ids(place(t, (2, 4), 1e6)) == [["b0", "b1"], ["a0", "a1", "a2", "a3"]]


def test_the_picture_in_the_docstring():
    t = Topology(tuple(devices("ohio", 9) + devices("virginia", 3)))
    assert [[d.region for d in chain] for chain in place(t, (4, 4, 4), 1e6)] == [
        ["ohio"] * 4,
        ["ohio"] * 4,
        ["virginia"] * 3 + ["ohio"],
    ]


def test_pipelines_share_a_region_and_a_node_if_they_can():
    t = Topology(tuple(devices("a", 2) + devices("b", 4)))
    assert ids(place(t, (2, 2), 1e6)) == [["b0", "b1"], ["b2", "b3"]]
    nodes = (Device("far", "far"), Device("near/0", "near"), Device("near/1", "near"))
    assert ids(place(Topology(nodes), (1, 1), 1e6)) == [["near/0"], ["near/1"]]


def test_faster_devices_first():
    t = Topology(tuple(devices("a", 2) + devices("b", 2, flops_per_s=2e12)))
    assert ids(place(t, (2,), 1e6)) == [["b0", "b1"]]


def test_a_pipeline_too_deep_for_a_region_goes_on_to_the_closest():
    near, far = Link(0.01, 1e9), Link(0.1, 1e9)
    links = {("a", "b"): far, ("b", "a"): far, ("a", "c"): near, ("c", "a"): near}
    t = Topology(tuple(devices("a", 3) + devices("b", 2) + devices("c", 2)), region_links=links)
    assert ids(place(t, (5,), 1e6)) == [["a0", "a1", "a2", "c0", "c1"]]


def test_closest_depends_on_the_size_of_messages():
    thin, late = Link(0.001, 1e6), Link(0.1, 1e9)
    links = {("a", "b"): thin, ("b", "a"): thin, ("a", "c"): late, ("c", "a"): late}
    t = Topology(tuple(devices("a", 2) + devices("b", 1) + devices("c", 1)), region_links=links)
    assert ids(place(t, (3,), 1e3))[0][-1] == "b0"
    assert ids(place(t, (3,), 1e7))[0][-1] == "c0"


def test_too_few_devices():
    with pytest.raises(ValueError, match="3 stages need more than 2 devices"):
        place(Topology(tuple(devices("a", 2))), (2, 1), 1.0)


@given(st.data())
def test_every_stage_has_a_device_of_its_own(data):
    pool = tuple(
        d
        for region in "abc"
        for d in devices(
            region, data.draw(st.integers(1, 4)), per_node=data.draw(st.integers(1, 3))
        )
    )
    depths = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=len(pool)))
    while sum(depths) > len(pool):
        depths.pop()
    if not depths:
        depths = [1]
    chains = place(Topology(pool), depths, 1e6)
    assert [len(chain) for chain in chains] == depths
    used = [d.id for chain in chains for d in chain]
    assert len(set(used)) == len(used)
    # The order in which devices are listed does not matter.
    shuffled = data.draw(st.permutations(pool))
    assert place(Topology(tuple(shuffled)), depths, 1e6) == chains
