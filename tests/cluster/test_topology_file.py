from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_train_geo.cluster.topology import Device, Link, Topology
from ray_train_geo.cluster.topology_file import dump_topology, load_topology
from ray_train_geo.errors import SpecError

EXAMPLE = """
devices:
  - {id: a/0, node: a, region: ohio, type: A100-80G, flops_per_s: 1.4e14, memory_bytes: 8e10}
  - {id: b/0, node: b, region: virginia, zone: z1, market_type: spot}
links:
  - {from: ohio, to: virginia, latency_ms: 11, bandwidth_gbps: 1.12}
  - {from: a, to: b, between: nodes, latency_ms: 9, bandwidth_gbps: 2, symmetric: false}
"""


def read(tmp_path, text):
    path = tmp_path / "topology.yaml"
    path.write_text(text)
    return load_topology(path)


def test_example(tmp_path):
    t = read(tmp_path, EXAMPLE)
    assert t.devices == (
        Device("a/0", "a", "ohio", "", "on-demand", "A100-80G", 1.4e14, 80_000_000_000),
        Device("b/0", "b", "virginia", "z1", "spot"),
    )
    wan = Link(pytest.approx(0.011), pytest.approx(1.4e8))
    assert t.region_links == {("ohio", "virginia"): wan, ("virginia", "ohio"): wan}
    assert t.node_links == {("a", "b"): Link(pytest.approx(0.009), pytest.approx(2.5e8))}


def test_links_alone(tmp_path):
    t = read(tmp_path, "links: [{from: x, to: x, latency_ms: 5, bandwidth_gbps: 2}]")
    assert t.devices == ()
    assert list(t.region_links) == [("x", "x")]


DEVICE = "devices: [{id: a, node: n, region: x}]\n"


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        ("- a", ["a topology is a mapping"]),
        ("devices: [", ["is not valid YAML"]),
        ("gpus: []", ["gpus: "]),
        ("devices: [{node: n}]", ["devices.0.id: Field required"]),
        ("devices: [{id: a, node: n, flops_per_s: 0}]", ["devices.0.flops_per_s: ", "than 0"]),
        ("devices: [{id: a, node: n, memory_bytes: lots}]", ["devices.0.memory_bytes: "]),
        ("devices: [{id: a, node: n, memory_bytes: 1e999}]", ["devices.0.memory_bytes: "]),
        ("links: [{from: x, to: y, latency_ms: -1, bandwidth_gbps: 0}]", ["latency", "bandwidth"]),
        ("links: [{from: x, to: y, latency_ms: .inf, bandwidth_gbps: 1}]", ["links.0.latency_ms"]),
        ("devices: [{id: a, node: n}, {id: a, node: m}]", ["devices.1.id: 'a' is given twice"]),
        (
            "devices: [{id: a, node: n, region: x}, {id: b, node: n, region: y}]",
            ["devices.1.region: node 'n' is in 'x' already"],
        ),
        (
            DEVICE + "links: [{from: x, to: z, latency_ms: 1, bandwidth_gbps: 1}]",
            ["links.0: no device is in 'z'", "regions (x)"],
        ),
        (
            DEVICE + "links: [{from: n, to: n, between: nodes, latency_ms: 1, bandwidth_gbps: 1}]",
            ["links.0: a node has no link to itself"],
        ),
        (
            "links: [{from: x, to: y, latency_ms: 1, bandwidth_gbps: 1},"
            " {from: y, to: x, latency_ms: 2, bandwidth_gbps: 1, symmetric: false}]",
            ["links.1: y -> x is given twice", "symmetric: false"],
        ),
    ],
)
def test_wrong_input_is_refused_with_where(tmp_path, text, messages):
    with pytest.raises(SpecError) as e:
        read(tmp_path, text)
    assert str(e.value).startswith(str(tmp_path / "topology.yaml"))
    for message in messages:
        assert message in str(e.value)


def test_every_fault_is_reported_at_once(tmp_path):
    with pytest.raises(SpecError) as e:
        read(tmp_path, "devices: [{id: a}, {node: n}]")
    assert "devices.0.node" in str(e.value)
    assert "devices.1.id" in str(e.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(SpecError, match=r"can't read the topology .*none.yaml: No such file"):
        load_topology(tmp_path / "none.yaml")


names = st.sampled_from(["ohio", "no", "1", "a b", "ü: x"])
links = st.builds(Link, st.floats(0, 10), st.floats(1, 1e12))


@given(
    st.lists(
        st.builds(
            Device,
            id=st.uuids().map(str),
            node=st.uuids().map(str),
            region=names,
            zone=names,
            market_type=st.sampled_from(["spot", "on-demand"]),
            type=names,
            flops_per_s=st.floats(1, 1e18),
            memory_bytes=st.integers(1, 10**15),
        ),
        max_size=4,
    ),
    st.data(),
)
def test_what_is_written_reads_back(tmp_path_factory, devices, data):
    def some(of):
        if not of:
            return {}
        pairs = st.tuples(st.sampled_from(of), st.sampled_from(of))
        return data.draw(st.dictionaries(pairs, links, max_size=4))

    nodes = sorted({d.node for d in devices})
    node_links = {k: v for k, v in some(nodes).items() if k[0] != k[1]}
    region_links = some(sorted({d.region for d in devices}))
    if region_links:  # both directions alike: one entry in the file
        (a, b), link = next(iter(region_links.items()))
        region_links[b, a] = link
    path = tmp_path_factory.mktemp("topology") / "t.yaml"
    dump_topology(Topology(tuple(devices), node_links, region_links), path)
    t = load_topology(path)
    assert t.devices == tuple(devices)
    for read_back, written in ((t.node_links, node_links), (t.region_links, region_links)):
        assert set(read_back) == set(written)
        for pair, link in written.items():
            assert read_back[pair].latency_s == pytest.approx(link.latency_s)
            assert read_back[pair].bandwidth_bytes_per_s == pytest.approx(
                link.bandwidth_bytes_per_s
            )
