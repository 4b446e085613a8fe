from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ray_train_geo.cluster.topology import Device, Link, Topology
from ray_train_geo.planning.device_classes import device_classes
from ray_train_geo.planning.link_table import LinkTable

FEW_LINKS = st.builds(Link, st.sampled_from([0.0, 0.01]), st.sampled_from([1e8, 1e9]))


@st.composite
def topologies(draw):
    """Few kinds of links over few nodes, so that twins are common and near twins too."""
    regions = ["x", "y", "z"][: draw(st.integers(1, 3))]
    nodes = [
        (f"n{i}", draw(st.sampled_from(regions)), draw(st.integers(1, 3)))
        for i in range(draw(st.integers(1, 5)))
    ]
    names = [name for name, _, _ in nodes]
    pair = st.tuples(st.sampled_from(names), st.sampled_from(names))
    return Topology(
        devices=tuple(Device(f"{n}/{i}", n, r) for n, r, count in nodes for i in range(count)),
        node_links=draw(st.dictionaries(pair, FEW_LINKS, max_size=3))
        | {(n, n): draw(FEW_LINKS) for n in names},
        region_links={(a, b): draw(FEW_LINKS) for a in regions for b in regions},
    )


def twins(topology, a, b):
    others = [d for d in topology.devices if d not in (a, b)]
    return topology.link(a, b) == topology.link(b, a) and all(
        topology.link(a, c) == topology.link(b, c) and topology.link(c, a) == topology.link(c, b)
        for c in others
    )


@given(topologies())
def test_devices_share_a_class_exactly_if_they_are_twins(topology):
    label = device_classes(LinkTable.of(topology)).label
    for i, a in enumerate(topology.devices):
        for j, b in enumerate(topology.devices):
            if i < j:
                assert (label[i] == label[j]) == twins(topology, a, b)


@given(topologies())
def test_members_and_labels_say_the_same(topology):
    classes = device_classes(LinkTable.of(topology))
    for number, members in enumerate(classes.members):
        assert all(classes.label[device] == number for device in members)
    assert sorted(sum(classes.members, ())) == list(range(len(topology.devices)))


def test_ten_thousand_devices_in_sixteen_regions_are_sixteen_classes():
    devices = tuple(Device(f"n{i}/0", f"n{i}", f"r{i % 16}") for i in range(10_000))
    links = {(f"r{a}", f"r{b}"): Link(0.01 * abs(a - b), 1e9) for a in range(16) for b in range(16)}
    classes = device_classes(LinkTable.of(Topology(devices, region_links=links)))
    assert [len(members) for members in classes.members] == [625] * 16
