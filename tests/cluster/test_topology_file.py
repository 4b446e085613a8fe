from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from topologies import topologies

from ray_train_geo.cluster.gpus import gpu
from ray_train_geo.cluster.scenarios import SCENARIOS, scenario
from ray_train_geo.cluster.topology import DEFAULT_LINK, Device, Link, Topology, Uplink
from ray_train_geo.cluster.topology_file import dump_topology, load_topology
from ray_train_geo.errors import SpecError

EXAMPLES = sorted((Path(__file__).parents[2] / "examples" / "topologies").glob("*.yaml"))
GBPS = 1.25e8

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
        Device(
            id="a/0",
            node="a",
            region="ohio",
            type="A100-80G",
            flops_per_s=1.4e14,
            memory_bytes=80_000_000_000,
            price_per_hour=gpu("A100-80G").price_per_hour("on-demand"),
        ),
        Device("b/0", "b", "virginia", "z1", "spot"),
    )
    wan = Link(pytest.approx(0.011), pytest.approx(1.4e8))
    assert t.region_links == {("ohio", "virginia"): wan, ("virginia", "ohio"): wan}
    assert t.node_links == {("a", "b"): Link(pytest.approx(0.009), pytest.approx(2.5e8))}


def test_links_alone(tmp_path):
    t = read(tmp_path, "links: [{from: x, to: x, latency_ms: 5, bandwidth_gbps: 2}]")
    assert t.devices == ()
    assert list(t.region_links) == [("x", "x")]
    assert t.default_link == DEFAULT_LINK


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_examples_load(path):
    assert len({d.region for d in load_topology(path).devices}) > 1


def test_the_mixed_example_is_the_scenario():
    assert load_topology(EXAMPLES[0].with_name("mixed.yaml")) == scenario("mixed")


# ------------------------------------------------------------------ devices


def test_a_known_type_is_enough(tmp_path):
    t = read(tmp_path, "devices: [{id: a/0, node: a, region: x, type: T4, market_type: spot}]")
    assert t.devices == (gpu("T4").device("a/0", "a", "x", market_type="spot"),)


def test_explicit_figures_win(tmp_path):
    t = read(
        tmp_path,
        """
devices:
  - {id: a, node: a, type: T4, flops_per_s: 1.0e13}
  - {id: b, node: b, type: T4, memory_gb: 12.5, price_per_hour: 0}
  - {id: c, node: c, type: T4, flops_by_precision: {fp16: 2.0e13}}
  - {id: d, node: d, type: Trainium, flops_per_s: 1.0e13, memory_bytes: 16e9}
  - {id: e, node: e, type: Trainium, flops_by_precision: {bf16: 5, fp32: 2}, memory_gb: 16}
""",
    )
    a, b, c, d, e = t.devices
    t4 = gpu("T4")
    assert (a.flops_per_s, a.flops_by_precision) == (1e13, ())  # at every precision
    assert (a.memory_bytes, a.price_per_hour) == (t4.memory_bytes, t4.price_per_hour("on-demand"))
    assert (b.memory_bytes, b.price_per_hour) == (12_500_000_000, 0)
    assert b.flops_by_precision == t4.device("b", "b").flops_by_precision
    assert (c.flops_per_s, c.flops_by_precision) == (2e13, (("fp16", 2e13),))
    assert (d.flops_per_s, d.memory_bytes, d.price_per_hour) == (1e13, 16_000_000_000, 0)
    assert (e.flops_per_s, dict(e.flops_by_precision)) == (5, {"bf16": 5, "fp32": 2})


def test_nodes(tmp_path):
    t = read(
        tmp_path,
        """
nodes:
  - {node: a, region: ohio, zone: z, type: V100-16G, gpus: 2, count: 2}
  - {node: b, region: ohio, type: L4}
devices:
  - {id: c, node: c, region: ohio}
""",
    )
    assert [d.id for d in t.devices] == ["c", "a-0/0", "a-0/1", "a-1/0", "a-1/1", "b/0"]
    assert t.device("a-1/0") == gpu("V100").device("a-1/0", "a-1", "ohio", "z")


# ------------------------------------------------------------------ the network

TWO = "nodes: [{node: a, region: x, gpus: 2, count: 2}, {node: b, region: y}]\n"
WAN = "links:\n  - {from: x, to: y, latency_ms: 20, bandwidth_gbps: 1}\n"


def test_links(tmp_path):
    t = read(
        tmp_path,
        TWO
        + """
links:
  - {from: x, to: y, latency_s: 0.02, bandwidth_gbps: 1, window_mb: 16}
  - {from: a-0, to: a-0, between: nodes, latency_ms: 0.01, bandwidth_bytes_per_s: 1.0e10}
""",
    )
    assert t.region_links["y", "x"] == Link(0.02, GBPS, 16e6)
    assert t.link(*t.devices[:2]) == Link(1e-5, 1e10)
    assert t.default_link is None


def test_links_inside_nodes(tmp_path):
    t = read(
        tmp_path,
        TWO
        + WAN
        + """
  - {from: x, to: x, between: devices, latency_ms: 0, bandwidth_gbps: 100}
  - {from: a-1, to: a-1, between: nodes, latency_ms: 0, bandwidth_gbps: 200}
""",
    )
    assert t.node_links == {
        ("a-0", "a-0"): Link(0, 100 * GBPS),
        ("a-1", "a-1"): Link(0, 200 * GBPS),
    }


def test_uplinks(tmp_path):
    t = read(
        tmp_path,
        TWO
        + WAN
        + """
uplinks:
  - {node: "*", gbps: 40}
  - {region: x, gbps: 10}
  - {node: a-1, out_gbps: 1, in_bytes_per_s: 2}
  - {from: x, to: y, gbps: 3}
""",
    )
    assert t.node_uplinks == {
        "a-0": Uplink(10 * GBPS, 10 * GBPS),
        "a-1": Uplink(GBPS, 2),
        "b": Uplink(40 * GBPS, 40 * GBPS),
    }
    assert t.region_uplinks == {("x", "y"): 3 * GBPS, ("y", "x"): 3 * GBPS}


def test_uplinks_without_devices(tmp_path):
    text = "uplinks: [{node: a, gbps: 8}, {from: x, to: y, gbps: 8, symmetric: false}]"
    t = read(tmp_path, text)
    assert t.node_uplinks == {"a": Uplink(1e9, 1e9)}
    assert t.region_uplinks == {("x", "y"): 1e9}


def test_default_link(tmp_path):
    t = read(tmp_path, TWO + "default_link: {latency_ms: 50, bandwidth_gbps: 0.5, window_mb: 4}")
    assert t.default_link == Link(0.05, 0.5 * GBPS, 4e6)
    assert read(tmp_path, "default_link:").default_link is None


# ------------------------------------------------------------------ wrong input


DEVICE = "devices: [{id: a, node: n, region: x}]\n"
FIGURES = ("0", "-1", ".nan", ".inf")


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
        ("links: [{from: x, to: y}]", ["links.0: latency_ms is missing"]),
        ("links: [{from: x, to: y, latency_ms: 1}]", ["links.0: bandwidth_gbps is missing"]),
        (
            "links: [{from: x, to: y, latency_ms: 1, latency_s: 1, bandwidth_gbps: 1}]",
            ["links.0: give only one of latency_ms, latency_s"],
        ),
        *(
            (f"links: [{{from: x, to: y, latency_ms: 1, bandwidth_gbps: {x}}}]", ["links.0.band"])
            for x in FIGURES
        ),
        *(
            (f"default_link: {{latency_ms: {x}, bandwidth_gbps: 1}}", ["default_link.latency_ms"])
            for x in FIGURES[1:]
        ),
        *((f"devices: [{{id: a, node: n, flops_per_s: {x}}}]", ["devices.0.fl"]) for x in FIGURES),
        *((f"devices: [{{id: a, node: n, memory_gb: {x}}}]", ["devices.0.mem"]) for x in FIGURES),
        (
            "devices: [{id: a, node: n, memory_gb: 1, memory_bytes: 1}]",
            ["devices.0: give only one of memory_bytes, memory_gb"],
        ),
        ("devices: [{id: a, node: n, price_per_hour: -1}]", ["devices.0.price_per_hour"]),
        ("devices: [{id: a, node: n, flops_by_precision: {fp8: 1}}]", ["fp8", "'fp16'"]),
        (
            "devices: [{id: a, node: n, type: A1000}]",
            ["devices.0: no GPU type 'A1000'", "or give flops_per_s and memory_bytes"],
        ),
        ("nodes: [{node: n, gpus: 0}]", ["nodes.0.gpus"]),
        ("nodes: [{node: n}, {node: n}]", ["nodes.1.id: 'n/0' is given twice"]),
        ("uplinks: 3", ["uplinks: "]),
        ("uplinks: [{gbps: 1}]", ["uplinks.0: say whose it is: node"]),
        ("uplinks: [{node: n}]", ["uplinks.0: gbps (or out_gbps) is missing"]),
        ("uplinks: [{node: n, out_gbps: 1}]", ["uplinks.0: gbps (or in_gbps) is missing"]),
        *((f"uplinks: [{{node: n, gbps: {x}}}]", ["uplinks.0.gbps"]) for x in FIGURES),
        *((f"uplinks: [{{from: x, to: y, gbps: {x}}}]", ["uplinks.0.gbps"]) for x in FIGURES),
        ("uplinks: [{node: n, region: x, gbps: 1}]", ["uplinks.0: give only one of node, region"]),
        ("uplinks: [{from: x, to: y}]", ["uplinks.0: gbps is missing"]),
        ("uplinks: [{from: x, to: x, gbps: 1}]", ["uplinks.0: an uplink is between two regions"]),
        ("uplinks: [{region: x, gbps: 1}]", ["uplinks.0: the file has no devices"]),
        (DEVICE + "uplinks: [{node: m, gbps: 1}]", ["uplinks.0: no device is in 'm'"]),
        (DEVICE + "uplinks: [{region: z, gbps: 1}]", ["uplinks.0: no device is in 'z'"]),
        (
            DEVICE + "uplinks: [{node: n, gbps: 1}, {node: n, gbps: 1}]",
            ["uplinks.1: 'n' is given twice"],
        ),
        (
            "uplinks: [{from: x, to: y, gbps: 1}, {from: y, to: x, gbps: 1}]",
            ["uplinks.1: x -> y is given twice", "uplinks.1: y -> x is given twice"],
        ),
        (TWO, ["no link joins the islands {x}; {y}"]),
        (TWO + WAN.replace("}", ", symmetric: false}"), ["link x -> y is one-way"]),
        (
            "links: [{from: x, to: y, latency_ms: 1, bandwidth_gbps: 1, symmetric: false}]",
            ["link x -> y is one-way"],
        ),
        (
            "default_link: {latency_ms: 1, bandwidth_gbps: 1e308}",
            ["default_link: bandwidth is inf"],
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


# ------------------------------------------------------------------ writing


def test_scenarios_read_back(tmp_path):
    for name in SCENARIOS:
        dump_topology(scenario(name), tmp_path / "t.yaml")
        assert load_topology(tmp_path / "t.yaml") == scenario(name)


names = st.sampled_from(["ohio", "no", "1", "a b", "ü: x"])
rates = st.floats(1, 1e15)
links = st.builds(Link, st.floats(0, 10), rates, rates | st.just(math.inf))


@st.composite
def any_topology(draw) -> Topology:
    """A random topology with names and figures that are hard to write."""
    topology = draw(topologies(max_devices=3, max_regions=2))
    called = dict(zip(("r0", "r1"), draw(st.permutations(["no", "ü: x"])), strict=True))
    return Topology(
        devices=tuple(
            replace(
                device,
                region=called[device.region],
                zone=draw(names),
                type=draw(st.sampled_from([device.type, "1"])),
                flops_per_s=draw(rates),
                memory_bytes=draw(st.integers(1, 10**15)),
                price_per_hour=draw(st.floats(0, 100)),
                flops_by_precision=draw(st.sampled_from([(), device.flops_by_precision])),
            )
            for device in topology.devices
        ),
        node_links={pair: draw(links) for pair in topology.node_links},
        region_links={(called[a], called[b]): draw(links) for a, b in topology.region_links},
        node_uplinks={n: Uplink(draw(rates), draw(rates)) for n in topology.node_uplinks},
        region_uplinks={(called[a], called[b]): draw(rates) for a, b in topology.region_uplinks},
        default_link=draw(st.none() | links),
    )


@given(any_topology())
def test_what_is_written_reads_back(tmp_path_factory, topology):
    path = tmp_path_factory.getbasetemp() / "t.yaml"
    dump_topology(topology, path)
    assert load_topology(path) == topology
    bare = topology.with_devices([])
    dump_topology(bare, path)
    assert load_topology(path) == bare


def test_the_documented_example_loads(tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "topology.md").read_text()
    example = page.partition("```yaml\n")[2].partition("```")[0]
    t = read(tmp_path, example)
    assert len(t.devices) == 34
    assert t.device("lab/0").memory_bytes == 48_000_000_000
