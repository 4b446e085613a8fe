from __future__ import annotations

import pytest

from ray_train_geo.cluster.topology import DEFAULT_LINK, LOCAL_LINK, Device, Link, Topology

A, B = Device("a", "n0", region="x"), Device("b", "n1", region="x")
C, A2 = Device("c", "n2", region="y"), Device("a2", "n0", region="x")
NODE, REGION = Link(0.001, 1e8), Link(0.1, 1e7)
TOPOLOGY = Topology((A, B, C, A2), {("n0", "n1"): NODE}, {("x", "x"): REGION, ("x", "y"): REGION})


@pytest.mark.parametrize(
    ("source", "target", "link"),
    [
        (A, A2, LOCAL_LINK),  # one node, whatever its region says
        (A, B, NODE),
        (B, A, REGION),  # links are directed
        (A, C, REGION),
        (C, A, DEFAULT_LINK),
    ],
)
def test_the_most_specific_link_wins(source, target, link):
    assert TOPOLOGY.link(source, target) == link


def test_transfer():
    assert Link(0.5, 100.0).transfer_s(200) == pytest.approx(2.5)


def test_device():
    assert TOPOLOGY.device("c") is C
    with pytest.raises(KeyError):
        TOPOLOGY.device("z")


def test_several_flows_have_several_windows_and_no_more_than_the_path() -> None:
    link = Link(0.1, 1e8, window_bytes=5e6)
    assert link.flow_bytes_per_s == pytest.approx(2.5e7)
    assert link.striped(2).flow_bytes_per_s == pytest.approx(5e7)
    assert link.striped(8).flows == 4
    assert link.striped(8).flow_bytes_per_s == 1e8
    assert Link(0.1, 1e8).striped(8).flows == 1, "nothing holds the one flow up"
    assert (
        Topology((), region_links={("a", "b"): link}).striped(3).region_links["a", "b"].flows == 3
    )
